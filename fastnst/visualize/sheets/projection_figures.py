"""Figures of projections: strips of whole layers, sheets of single maps, and close-ups."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst.images import printable
from fastnst.progress import ProgressReport
from fastnst.visualize.deconv.neurons import Activation, Neurons
from fastnst.visualize.deconv.receptive_field import ReceptiveField
from fastnst.visualize.sheets.layer_strip import layer_strip
from fastnst.visualize.sheets.page import Figure
from fastnst.visualize.sheets.render import Row, about_grey, colour_scale, contact_sheet, mosaic, number

MAPS_PER_SHEET = 63
"""With the image itself, eight rows of eight."""
_NEURONS_PER_UPDATE = 64  # of the progress report

HOW_TO_READ = (
    "Each projection shows, in the colours of the pixels, what in the image caused the activation (Zeiler & Fergus "
    "2014): grey is zero, brighter or darker is more or less of red, green and blue."
)
_TITLES = {"strongest": "each map's strongest activation", "all": "all activations of each map"}


@dataclass(frozen=True)
class Crop:
    """An image to project, with the names for its figures."""

    command: str
    network: str
    path: Path
    name: str
    pixels: Tensor
    """`[1, 3, H, W]`, RGB in [0, 1], on the network's device."""

    @property
    def tag(self) -> str:
        return f"visualize/{self.command}/{printable(self.name)}"

    @property
    def file_name(self) -> str:
        return printable(self.path.name)


def strip_figure(crop: Crop, projections: Mapping[str, Tensor], output: Tensor | None = None) -> Figure:
    """Draw the image, each layer's projection, and the stylized output if any: see `layer_strip`."""
    goal = "" if output is None else ", and the stylized output"
    return Figure(
        f"{crop.name}-layers",
        f"{crop.tag}/layers",
        layer_strip(crop.pixels, projections, output),
        f"{crop.file_name} on its way through {crop.network}: all activations of each layer together, projected back "
        "to pixels. Each layer has a scale of its own, printed above it.",
        f"A row of images: {crop.file_name}, then its projections from {', '.join(projections)}{goal}.",
    )


def map_figures(
    crop: Crop,
    layer: str,
    activations: Tensor,
    neurons: Neurons,
    project: Callable[[Neurons], Tensor],
    *,
    activation: Activation,
    field: ReceptiveField | None,
    progress: ProgressReport,
) -> list[Figure]:
    """Project single maps and draw them beside the image, all on one scale, on one or more sheets.

    Args:
        crop: the image.
        layer, activations: of the maps, `[1, C, h, w]` or `[1, C]`.
        neurons, activation: the maps with a position each or none, and the option that selected them.
        project: neurons → `[K, 3, H, W]`.
        field: for close-ups of each receptive field beside the same part of the image; None: no close-ups.
        progress: counts maps.
    """
    projections = _project_in_parts(project, neurons, progress)
    scale = colour_scale(projections)
    tiles = list(about_grey(projections, scale))
    photo = crop.pixels[0].cpu()
    maps = neurons.maps.tolist()
    positions = [None] * len(maps) if neurons.positions is None else neurons.positions.tolist()
    captions = [
        f"map {channel} · {_caption(activations[0, channel], position)}"
        for channel, position in zip(maps, positions, strict=True)
    ]
    figures = []
    for start in range(0, len(maps), MAPS_PER_SHEET):
        part = slice(start, start + MAPS_PER_SHEET)
        end = layer if len(maps) <= MAPS_PER_SHEET else f"{layer}-{start // MAPS_PER_SHEET + 1}"
        note = f"grey = 0; black/white = ±{number(scale)}"
        tiles_shown, captions_shown = [photo, *tiles[part]], ["the image", *captions[part]]
        figures.append(_figure(crop, layer, activation, maps[part], end, tiles_shown, captions_shown, note))
        if field is not None and neurons.positions is not None:
            corners = (neurons.positions[part] * field.jump + field.start).tolist()
            pairs = [
                mosaic(torch.stack([_cut(tile, corner, field.size), _cut(photo, corner, field.size)]), 2, smallest=96)
                for tile, corner in zip(tiles[part], corners, strict=True)
            ]
            figures.append(_figure(crop, layer, activation, maps[part], f"{end}-close", pairs, captions[part], note))
    return figures


def columns_for(cells: int) -> int:
    """Choose columns for so many images: the sheet wider than high, with few empty cells."""
    low, high = math.ceil(math.sqrt(cells)), math.ceil(math.sqrt(2 * cells))
    return min(range(low, high + 1), key=lambda columns: (-cells % columns, columns))


def describe_activation(activation: Activation) -> str:
    """Format as `strongest`, `all` or `row 14, column 9`."""
    return activation if isinstance(activation, str) else f"row {activation[0]}, column {activation[1]}"


def _project_in_parts(project: Callable[[Neurons], Tensor], neurons: Neurons, progress: ProgressReport) -> Tensor:
    projections = []
    for start in range(0, len(neurons), _NEURONS_PER_UPDATE):
        part = neurons[start : start + _NEURONS_PER_UPDATE]
        projections.append(project(part).cpu())
        progress.advance(len(part))
    return torch.cat(projections)


def _figure(
    crop: Crop,
    layer: str,
    activation: Activation,
    maps: Sequence[int],
    end: str,
    images: Sequence[Tensor],
    captions: Sequence[str],
    note: str,
) -> Figure:
    columns = columns_for(len(images))
    rows = [
        Row(images[start : start + columns], captions[start : start + columns])
        for start in range(0, len(images), columns)
    ]
    listed = f"maps {', '.join(map(str, maps[:16]))}" + (f" and {len(maps) - 16} more" if len(maps) > 16 else "")
    described = describe_activation(activation)
    title = _TITLES.get(described, f"activation at {described}")
    close = "; left the projection, right the receptive field" if end.endswith("-close") else ""
    return Figure(
        f"{crop.name}-{end}",
        f"{crop.tag}/{end}",
        contact_sheet(rows, title=f"{layer}, {title} · {crop.file_name}", note=f"{note}{close}."),
        f"{layer} of {crop.network} on {crop.file_name}, {title}, {listed}: {note}, for all maps alike{close}.",
        f"{crop.file_name} and its projections from {layer}, {listed}.",
    )


def _caption(activations: Tensor, position: Sequence[int] | None) -> str:
    """Format as `12.3 @ (14, 9)`; for a whole map `[h, w]`, its active share and largest activation."""
    if position is None:
        return f"{float((activations > 0).double().mean()):.0%} active, up to {number(float(activations.amax()))}"
    if activations.ndim == 0:
        return number(float(activations))
    row, column = position
    return f"{number(float(activations[row, column]))} @ ({row}, {column})"


def _cut(image: Tensor, corner: Sequence[int], side: int) -> Tensor:
    """Cut a square out of `[3, H, W]`, mid-grey outside the image."""
    padded = F.pad(image, (side,) * 4, value=0.5)
    top, left = (min(max(place + side, 0), padded.shape[axis] - side) for axis, place in enumerate(corner, start=1))
    return padded[:, top : top + side, left : left + side]
