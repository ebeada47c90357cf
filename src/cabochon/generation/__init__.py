"""Writing with a model: what distribution is drawn from, and the engine that draws."""
