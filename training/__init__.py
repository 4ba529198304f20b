"""The training loop and what surrounds it: `Trainer` trains a model by an objective."""

from training.trainer import Trainer

__all__ = ["Trainer"]
