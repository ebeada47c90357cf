"""How good a model is, with its uncertainty."""
