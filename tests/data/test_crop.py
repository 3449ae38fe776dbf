"""Crop boxes, and images resized inside them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastnst.data.crop import crop_box, resize_crop
from fastnst.data.sampler import Fit


@pytest.mark.parametrize(
    ("fit", "crop", "box"),
    [
        ("random_crop", (0.25, 0.9), (15.0, 0.0, 55.0, 40.0)),
        ("center_crop", (0.5, 0.5), (30.0, 0.0, 70.0, 40.0)),
        ("squash", (0.25, 0.9), (0.0, 0.0, 100.0, 40.0)),
    ],
)
def test_crop_box(fit: Fit, crop: tuple[float, float], box: tuple[float, ...]) -> None:
    assert crop_box(100, 40, fit, np.array(crop, np.float32), 40) == box
    left, top, right, bottom = crop_box(40, 100, fit, np.array(crop[::-1], np.float32), 40)
    assert (top, left, bottom, right) == box


@pytest.mark.parametrize("width", [90, 128, 200])
def test_resize_crop_equals_resize_then_crop(width: int) -> None:
    """Against PyTorch: short side to 32 with antialiasing, then the crop; flipped last."""
    size, height = 32, 64
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    scaled = F.interpolate(
        torch.tensor(image).permute(2, 0, 1)[None].double(), (size, width // 2), mode="bilinear", antialias=True
    )
    left = width // 2 - size
    box = crop_box(width, height, "random_crop", np.array([(left - 3) / left, 0.7], np.float32), size)
    crop = resize_crop(Image.fromarray(image), box, size, flip=True).astype(int)
    expected = scaled[0, :, :, left - 3 : left - 3 + size].flip(-1).permute(1, 2, 0).numpy()
    # PyTorch leaves pixels beyond the border out of the mean; both loaders repeat the border.
    assert np.abs(crop - expected)[1:-1, 1:-1].max() <= 1
    assert np.abs(crop - expected).max() <= 64


def test_resize_crop_repeats_the_border() -> None:
    row = np.array([100, 40, 0, 80], np.uint8)
    image = Image.fromarray(np.broadcast_to(row[None, :, None], (4, 4, 3)).copy())
    # Half as wide: weights 1/8 3/8 3/8 1/8, with the border pixel repeated once.
    crop = resize_crop(image, (0.0, 0.0, 4.0, 4.0), 2, flip=False)
    assert crop[:, :, 0].tolist() == [[50 + 15, 5 + 40]] * 2
    assert resize_crop(image, (0.0, 0.0, 4.0, 4.0), 2, flip=True)[0, :, 0].tolist() == [45, 65]
