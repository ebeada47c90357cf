"""Reinforcement learning with environments: actors, central inference, unrolls, replay."""
