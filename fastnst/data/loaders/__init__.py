"""Load the batches of a run: decoded by DALI or by Pillow, or read from a cache."""

from fastnst.data.loaders.base import MAX_WORKERS, Loader, loader_name, open_loader

__all__ = ["MAX_WORKERS", "Loader", "loader_name", "open_loader"]
