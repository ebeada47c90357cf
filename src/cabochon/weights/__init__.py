"""How weights combine: pure functions on named tensors, and on model folders piece by piece."""
