"""How weights combine: pure functions on named tensors."""

from cabochon.weights.ema import ema

__all__ = ["ema"]
