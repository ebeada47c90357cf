"""What is minimised: pure functions from predictions and a batch to a summed `Loss`."""

from cabochon.losses.linear import cross_entropy, distillation

__all__ = ["cross_entropy", "distillation"]
