"""`fastnst visualize deconvnet` and `transform`: maps of either network, projected back to pixels, on sheets."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastnst.images import printable
from fastnst.models.transform_net import TransformNet
from fastnst.models.vgg19 import VGG19
from fastnst.progress import ProgressReport
from fastnst.visualize.commands.options import (
    Activation,
    MapChoice,
    columns_for,
    describe_activation,
    describe_choice,
    field_of,
    strengths,
)
from fastnst.visualize.deconv.neurons import Seeds
from fastnst.visualize.deconv.receptive_field import ReceptiveField, receptive_field
from fastnst.visualize.deconv.transform_net import TransformDeconvnet
from fastnst.visualize.deconv.vgg import Deconvnet
from fastnst.visualize.sheets.render import Row, about_grey, colour_scale, contact_sheet, mosaic, number
from fastnst.visualize.sheets.report import Report, Sheet, image_names
from fastnst.visualize.sheets.strips import layer_strip

MAPS_PER_SHEET = 63
"""With the image itself, eight rows of eight."""
_SEEDS_AT_ONCE = 64  # between two signs of progress

_HOW_TO_READ = (
    "Each projection shows, in the colours of the pixels, what in the image caused the activation (Zeiler & Fergus "
    "2014): grey is zero, brighter or darker is more or less of red, green and blue."
)

_PROJECTED = {"strongest": "each map's strongest activation", "all": "all activations of each map"}
_OWN_SCALES = "Each layer has a scale of its own, which stands above it."
# Without it, whatever starts from the last layers arrives as one and the same blob.
_RENORMALISED = "On the way back each norm normalises the signal by its own statistics, as it does on the way up."


def deconvnet(
    net: VGG19,
    images: Sequence[Path],
    squares: Sequence[Tensor],
    layers: Sequence[str],
    *,
    maps: MapChoice,
    activation: Activation = "strongest",
) -> Report:
    """Projections of VGG19's maps: a sheet per image and layer, and over several layers a strip per image.

    Args:
        net: as deep as the layers, on the device where it is to work.
        images: the files, for names.
        squares: their `[1, 3, H, W]`, RGB in [0, 1].
        layers: at least one, in the order in which they are shown.
        maps: which maps of each layer.
        activation: `strongest`, `all`, or the row and column of one.

    Raises:
        UserError: a map or position that a layer does not have.
    """
    walker = Deconvnet(net)
    sheets: list[Sheet] = []
    with _Counter("deconvnet", len(images), maps) as counter:
        for path, name, square in zip(images, image_names(images), squares, strict=True):
            shown = _Shown("deconvnet", "VGG19", path, name, square.to(net.mean))
            recording = walker.record(shown.square, layers)
            counter.begin([recording.activations[layer] for layer in layers])
            if len(layers) > 1:
                whole = {layer: walker.project_layer(recording, layer) for layer in layers}
                sheets.append(_strip(shown, whole, _OWN_SCALES))
            for layer in layers:
                project = partial(walker.project, recording, layer)
                seen = recording.activations[layer]
                sheets += _map_sheets(shown, layer, seen, project, maps, activation, counter.advance)
    settings = _settings(layers, squares[0]) | {"maps": maps.text, "activation": describe_choice(activation)}
    return Report("What VGG19 sees: projections by its deconvnet", _HOW_TO_READ, settings, sheets)


def transform(
    net: TransformNet,
    images: Sequence[Path],
    squares: Sequence[Tensor],
    layers: Sequence[str],
    *,
    maps: MapChoice | None = None,
) -> Report:
    """The transform net from photo to painting (the paper's Figure 2): a strip per image, and single maps.

    Args:
        net: on the device where it is to work.
        images: the files, for names.
        squares: their `[1, 3, H, W]`, RGB in [0, 1].
        layers: out of `net.layer_names`; they are shown front to back.
        maps: which to project one by one as well, all positions of each together; None: none.

    Raises:
        UserError: a layer that the network does not have, or a map that a layer does not have.
    """
    walker, weight = TransformDeconvnet(net), next(net.parameters())
    sheets: list[Sheet] = []
    with _Counter("transform", len(images), maps) as counter:
        for path, name, square in zip(images, image_names(images), squares, strict=True):
            shown = _Shown("transform", "the transform net", path, name, square.to(weight))
            recording = walker.record(shown.square, layers)
            layers = list(recording.activations)
            counter.begin(list(recording.activations.values()))
            with torch.no_grad():
                painting = net(shown.square).clamp(0, 1)
            whole = {layer: walker.project_layer(recording, layer, renormalise=True) for layer in layers}
            sheets.append(_strip(shown, whole, _OWN_SCALES, painting))
            if maps is not None:
                for layer in layers:
                    project = partial(walker.project, recording, layer, renormalise=True)
                    seen = recording.activations[layer]
                    sheets += _map_sheets(shown, layer, seen, project, maps, "all", counter.advance)
    settings = _settings(layers, squares[0]) | {"maps": maps.text if maps else "none but all at once"}
    return Report(
        "What the transform net sees: from photo to painting", f"{_HOW_TO_READ} {_RENORMALISED}", settings, sheets
    )


@dataclass(frozen=True)
class _Shown:
    command: str
    network: str
    path: Path
    name: str
    square: Tensor

    @property
    def tag(self) -> str:
        return f"visualize/{self.command}/{printable(self.name)}"

    @property
    def file_name(self) -> str:
        return printable(self.path.name)

    def field(self, layer: str) -> ReceptiveField | None:
        """What an activation sees, where that is a small part of the image and worth a closer look."""
        if self.network != "VGG19" or field_of(layer) is None:
            return None
        field = receptive_field(layer)
        return field if 2 * field.size <= min(self.square.shape[2:]) else None


def _strip(shown: _Shown, projections: Mapping[str, Tensor], scales: str, painting: Tensor | None = None) -> Sheet:
    goal = "" if painting is None else ", and the painting"
    return Sheet(
        f"{shown.name}-layers",
        f"{shown.tag}/layers",
        layer_strip(shown.square, projections, painting),
        f"{shown.file_name} on its way through {shown.network}: all activations of each layer together, projected "
        f"back to pixels. {scales}",
        f"A row of images: {shown.file_name}, then its projections from {', '.join(projections)}{goal}.",
    )


def _map_sheets(
    shown: _Shown,
    layer: str,
    activations: Tensor,
    project: Callable[[Seeds], Tensor],
    choice: MapChoice,
    activation: Activation,
    advance: Callable[[int], None],
) -> list[Sheet]:
    """The image and the projections of the chosen maps, all on one scale, on as many sheets as they need."""
    strength = strengths(layer, activations, activation)
    maps = choice.of(layer, strength)
    rows = [0] * len(maps)
    if isinstance(activation, tuple):
        seeds = Seeds.at(rows, maps, [activation] * len(maps), activations.device)
    elif activation == "all":
        seeds = Seeds.every_position(rows, maps, activations.device)
    else:
        seeds = Seeds.strongest(activations, rows, maps)
    projections = []
    for start in range(0, len(seeds), _SEEDS_AT_ONCE):
        some = seeds[start : start + _SEEDS_AT_ONCE]
        projections.append(project(some).cpu())
        advance(len(some))
    scale = colour_scale(torch.cat(projections))
    tiles = [about_grey(projection, scale) for part in projections for projection in part]
    positions = [None] * len(maps) if seeds.positions is None else seeds.positions.tolist()
    captions = [
        f"map {channel} · {describe_activation(activations[0, channel], position)}"
        for channel, position in zip(maps, positions, strict=True)
    ]
    sheets = []
    for start in range(0, len(maps), MAPS_PER_SHEET):
        part = slice(start, start + MAPS_PER_SHEET)
        ending = layer if len(maps) <= MAPS_PER_SHEET else f"{layer}-{start // MAPS_PER_SHEET + 1}"
        words = _Words(shown, layer, activation, maps[part], f"grey = 0; black/white = ±{number(scale)}")
        photo = shown.square[0].cpu()
        sheets.append(words.sheet(ending, [photo, *tiles[part]], ["the image", *captions[part]]))
        field = shown.field(layer)
        if field is not None and seeds.positions is not None:
            corners = (seeds.positions[part] * field.jump + field.start).tolist()
            pairs = [
                mosaic(torch.stack([_cut(tile, corner, field.size), _cut(photo, corner, field.size)]), 2, smallest=96)
                for tile, corner in zip(tiles[part], corners, strict=True)
            ]
            sheets.append(words.sheet(f"{ending}-close", pairs, captions[part]))
    return sheets


@dataclass(frozen=True)
class _Words:
    """What is said on and about the sheets of some maps of a layer."""

    shown: _Shown
    layer: str
    activation: Activation
    maps: Sequence[int]
    note: str

    def sheet(self, ending: str, images: Sequence[Tensor], captions: Sequence[str]) -> Sheet:
        columns = columns_for(len(images))
        rows = [
            Row(images[start : start + columns], captions[start : start + columns])
            for start in range(0, len(images), columns)
        ]
        shown, which = self.shown, f"maps {_listed(self.maps)}"
        what = _PROJECTED.get(describe_choice(self.activation), f"activation at {describe_choice(self.activation)}")
        close = "; left the projection, right all that the activation sees" if ending.endswith("-close") else ""
        return Sheet(
            f"{shown.name}-{ending}",
            f"{shown.tag}/{ending}",
            contact_sheet(rows, title=f"{self.layer}, {what} · {shown.file_name}", note=f"{self.note}{close}."),
            f"{self.layer} of {shown.network} on {shown.file_name}, {what}, {which}: {self.note}, for all maps "
            f"alike{close}.",
            f"{shown.file_name} and its projections from {self.layer}, {which}.",
        )


def _cut(image: Tensor, corner: Sequence[int], side: int) -> Tensor:
    """A square of `[3, H, W]`, mid-grey where it reaches beyond the image."""
    around = torch.nn.functional.pad(image, (side,) * 4, value=0.5)
    top, left = (min(max(place + side, 0), around.shape[axis] - side) for axis, place in enumerate(corner, start=1))
    return around[:, top : top + side, left : left + side]


def _listed(maps: Sequence[int]) -> str:
    listed = ", ".join(map(str, maps[:16]))
    return listed if len(maps) <= 16 else f"{listed} and {len(maps) - 16} more"


def _settings(layers: Sequence[str], square: Tensor) -> dict[str, str]:
    return {"layers": ", ".join(layers), "size": f"{square.shape[3]} × {square.shape[2]} px, the middle square"}


class _Counter(contextlib.ExitStack):
    """Reports how many maps are projected; how many there are is known when the first image has gone through."""

    def __init__(self, label: str, images: int, choice: MapChoice | None) -> None:
        super().__init__()
        self._label, self._images, self._choice = label, images, choice
        self._report: ProgressReport | None = None

    def begin(self, activations: Sequence[Tensor]) -> None:
        """Before the maps of each image."""
        if self._report is None and self._choice is not None:
            maps = sum(self._choice.count(layer.shape[1]) for layer in activations)
            self._report = self.enter_context(ProgressReport(self._label, self._images * maps, "maps"))

    def advance(self, maps: int) -> None:
        if self._report is not None:
            self._report.advance(maps)
