"""Convert between uint8 images and the tensors of the networks."""

from typing import TYPE_CHECKING

import numpy as np

from fastnst.errors import DataError

if TYPE_CHECKING:
    import torch


def to_tensor(array: np.ndarray) -> "torch.Tensor":
    """Convert a uint8 image `[H, W, 3]` to float32 `[1, 3, H, W]` in [0, 1], channels_last."""
    import torch

    assert array.dtype == np.uint8, array.dtype
    assert array.ndim == 3, array.shape
    assert array.shape[2] == 3, array.shape
    pixels = torch.tensor(array).permute(2, 0, 1).unsqueeze(0)
    return pixels.to(torch.float32).div_(255).contiguous(memory_format=torch.channels_last)


def to_array(tensor: "torch.Tensor") -> np.ndarray:
    """Convert a float image `[3, H, W]` or `[1, 3, H, W]` in [0, 1], on any device, to uint8 `[H, W, 3]`.

    Values are clamped, then rounded to the nearest of the 256 levels.

    Raises:
        DataError: it holds NaN.
    """
    import torch

    image = tensor.detach()
    if image.ndim == 4:
        assert image.shape[0] == 1, image.shape
        image = image[0]
    assert image.ndim == 3, image.shape
    assert image.shape[0] == 3, image.shape
    image = image.to(torch.float32)
    if bool(torch.isnan(image).any()):
        raise DataError("the image holds NaN; the model has diverged or its precision overflows, try fp32")
    return image.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
