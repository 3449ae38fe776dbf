"""Strips: an image on its way through a network, each layer projected back to pixels (the paper, Figures 2 and 3).

Layers differ in magnitude by orders, so each tile has its own scale about zero = grey, printed above it.
"""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from fastnst.visualize.sheets.render import about_grey, colour_scale, number, strip


def layer_strip(photo: Tensor, projections: Mapping[str, Tensor], output: Tensor | None = None) -> np.ndarray:
    """Draw the photo, the projections below their layer names, and the stylized image.

    Args:
        photo: RGB in [0, 1], `[1, 3, H, W]`.
        projections: layer → `[1, 3, H, W]`, in display order.
        output: the stylized image, like `photo`; None where the network makes none.

    Returns:
        uint8 `[H', W', 3]`.
    """
    scales = {layer: colour_scale(projection) for layer, projection in projections.items()}
    images = [photo, *(about_grey(projection, scales[layer]) for layer, projection in projections.items())]
    captions = ["photo", *(f"{layer} ±{number(scale)}" for layer, scale in scales.items())]
    if output is not None:
        images, captions = [*images, output], [*captions, "output"]
    return strip(images, captions, note="Grey is 0; black and white are the values above each layer.")
