"""Stylize images with a trained transform net: `stylize` tensors, `stylize_pixels` arrays, `stylize_files` files."""

from fastnst.inference.files import stylize_files
from fastnst.inference.tensors import stylize, stylize_pixels

__all__ = ["stylize", "stylize_files", "stylize_pixels"]
