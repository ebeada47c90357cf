"""How good a completion is: models of preferences, checks, and what they add up to."""
