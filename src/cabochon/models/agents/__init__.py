"""Networks of agents that act in environments."""
