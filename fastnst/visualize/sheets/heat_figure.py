"""Figures of heat maps: image, overlay, heat map and its colours side by side, with the raw numbers."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastnst.images import printable, to_array
from fastnst.visualize.sheets.page import Figure
from fastnst.visualize.sheets.render import Row, colour_scale, contact_sheet, heat_map, number, overlay

_LEGEND_WIDTH = 20  # pixels


def heat_figure(
    name: str,
    tag: str,
    path: Path,
    crop: Tensor,
    values: Tensor,
    *,
    title: str,
    note: str,
    signed: bool = False,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> Figure:
    """Draw the sheet of one image.

    Args:
        name, tag: of its files, and in TensorBoard.
        path, crop: of the image; `[1, 3, H, W]`, RGB in [0, 1].
        values: `[1, H, W]` on the CPU.
        title, note: above and below the images.
        signed: see `heat_map`.
        arrays: further numbers to write: end of a file name → array.
    """
    scale, crop = colour_scale(values), crop.cpu().float()
    heat = heat_map(values, signed=signed, scale=scale)
    blended = overlay(crop, heat)
    height = crop.shape[2]
    steps = torch.linspace(1, -1 if signed else 0, height).reshape(1, height, 1).expand(-1, -1, _LEGEND_WIDTH)
    legend = heat_map(steps, signed=signed, scale=1.0)
    ends = f"{number(-scale if signed else 0)} to {number(scale)}"
    file_name = printable(path.name)
    image = contact_sheet(
        [Row([crop, blended, heat, legend], [file_name, "over the image", "heat map", ends])],
        title=title,
        note=f"{note}.",
    )
    extras = {"-heat.png": to_array(heat), "-overlay.png": to_array(blended), "-heat.npy": values[0].numpy()}
    caption = f"{file_name}, {title}: {note}."
    alt = f"{file_name}; beside it a heat map of the same view, and the heat map over it in grey."
    return Figure(name, tag, image, caption, alt, {**extras, **(arrays or {})})
