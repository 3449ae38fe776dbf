"""Strips: an image and its projections from each layer of a network (the paper, Figures 2 and 3).

Layers differ in magnitude by orders, so each tile has its own scale about zero = grey, printed above it.
"""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from fastnst.visualize.sheets.render import Row, about_grey, colour_scale, contact_sheet, number


def layer_strip(photo: Tensor, projections: Mapping[str, Tensor], output: Tensor | None = None) -> np.ndarray:
    """Draw the photo, the projections below their layer names, and the stylized image, if any.

    Args:
        photo, output: RGB in [0, 1], `[1, 3, H, W]`.
        projections: layer → `[1, 3, H, W]`, in display order.

    Returns:
        uint8 `[H', W', 3]`.
    """
    scales = {layer: colour_scale(projection) for layer, projection in projections.items()}
    images = [photo, *(about_grey(projection, scales[layer]) for layer, projection in projections.items())]
    captions = ["photo", *(f"{layer} ±{number(scale)}" for layer, scale in scales.items())]
    if output is not None:
        images, captions = [*images, output], [*captions, "output"]
    note = "Grey is 0; black and white are the values above each layer."
    return contact_sheet([Row(images, captions)], note=note, captions_on_top=True)
