"""Many environments, one batched inference, one learner: the architecture of SEED RL."""
