"""Stylize images with a trained transform net: tensors with `stylize`, files with `stylize_files`."""

from fastnst.inference.files import stylize_files
from fastnst.inference.tensors import stylize

__all__ = ["stylize", "stylize_files"]
