"""Episodes of experience as RLDS lays them out: records, files, transformations, rollouts."""
