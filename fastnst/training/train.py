"""The entry to a training run."""

from fastnst.training.trainer import train

__all__ = ["train"]
