"""`fastnst visualize top`: for each feature map, what excites it most in a folder (Zeiler & Fergus 2014, Figure 2)."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from fastnst.data.manifest import Manifest
from fastnst.images import printable
from fastnst.models.vgg19 import VGG19
from fastnst.progress import counted
from fastnst.visualize.attribution.top_activations import TopActivations, TopPatches, find_top_activations, project_top
from fastnst.visualize.commands.options import MapChoice
from fastnst.visualize.deconv.receptive_field import receptive_field
from fastnst.visualize.sheets.render import Row, about_grey, colour_scale, contact_sheet, mosaic, number
from fastnst.visualize.sheets.report import Report, Sheet

MAPS_PER_SHEET = 16
_COLUMNS = 2
_PATCH_BYTES = 1 << 30  # of projections and patches held at a time

_HOW_TO_READ = (
    "For each feature map its strongest activations in the whole folder, one per image: left their projections back "
    "to pixels, grey being zero and each map having a scale of its own; right what the activation sees of the image, "
    "strongest first (Zeiler & Fergus 2014, Figure 2)."
)


def top(
    net: VGG19,
    manifest: Manifest,
    layer: str,
    *,
    maps: MapChoice,
    count: int,
    size: int,
    loader: str,
    device: torch.device,
) -> Report:
    """Sheets of a layer's maps, each with the projections and the image patches of its strongest activations.

    Args:
        net: as deep as the layer, on the device.
        manifest: the folder's images.
        layer: up to `pool5`.
        maps: which; of `top:N`, those with the strongest activations of all.
        count: activations per map.
        size: side in pixels of the squares that the images become.
        loader: `pillow` or `dali`.
        device: where the net is.

    Raises:
        UserError: a map that the layer does not have, or another argument out of range.
        DataError: an image that changed since the folder was checked.
    """
    named = None if maps.numbers is None else maps.numbers
    with counted(f"top of {layer}", "images") as progress:
        found = find_top_activations(
            net,
            manifest,
            layer,
            named,
            count=count,
            size=size,
            loader=loader,
            device=device,
            progress=progress,
        )
    if named is None:
        found = _rows(found, maps.of(layer, found.values[:, 0]))
    sheets: list[Sheet] = []
    side = receptive_field(layer).size
    at_once = max(1, _PATCH_BYTES // (24 * count * side * side * MAPS_PER_SHEET)) * MAPS_PER_SHEET
    for start in range(0, len(found.maps), at_once):
        part = _rows(found, list(range(start, min(start + at_once, len(found.maps)))))
        with counted(f"project {layer}", "images") as progress:
            patches = project_top(net, manifest, part, size=size, loader=loader, device=device, progress=progress)
        for first in range(0, len(part.maps), MAPS_PER_SHEET):
            here = list(range(first, min(first + MAPS_PER_SHEET, len(part.maps))))
            sheets.append(_sheet(manifest, _rows(part, here), _patches_of(patches, here), len(sheets) + 1))
    if len(sheets) == 1:
        sheets = [replace(sheets[0], name=layer, tag=f"visualize/top/{layer}")]
    settings = {
        "folder": f"{printable(manifest.folder)}, {len(manifest.images)} images",
        "layer": layer,
        "maps": maps.text,
        "count": f"{count} strongest activations per map",
        "size": f"{size} × {size} px, the middle square of each image",
        "receptive field": f"{side} × {side} px",
    }
    return Report(f"What excites {layer} of VGG19", _HOW_TO_READ, settings, sheets)


def _sheet(manifest: Manifest, part: TopActivations, patches: TopPatches, ordinal: int) -> Sheet:
    cells, captions = [], []
    table = [("map", "rank", "activation", "row, column", "image")]
    columns = math.ceil(math.sqrt(part.values.shape[1]))
    for row, map_number in enumerate(part.maps):
        held = int((part.images[row] >= 0).sum())
        projections, seen = patches.projections[row, :held], patches.patches[row, :held]
        scale = colour_scale(projections)
        left, right = mosaic(about_grey(projections, scale), columns), mosaic(seen, columns)
        cells.append(torch.cat([left, left.new_ones(3, left.shape[1], 8), right], dim=2))
        values = part.values[row, :held].tolist()
        captions.append(
            f"map {map_number} · {number(values[0])} to {number(values[-1])} · black/white = ±{number(scale)}"
        )
        for rank in range(held):
            place = ", ".join(map(str, part.positions[row, rank].tolist()))
            path = printable(manifest.images[int(part.images[row, rank])].path)
            table.append((str(map_number), str(rank + 1), number(values[rank]), place, path))
    rows = [
        Row(cells[start : start + _COLUMNS], captions[start : start + _COLUMNS])
        for start in range(0, len(cells), _COLUMNS)
    ]
    image = contact_sheet(
        rows,
        title=f"{part.layer}: strongest activations in {printable(manifest.folder.name)}",
        note="Left of each pair the projections, grey = 0; right what was seen, strongest first.",
        largest=cells[0].shape[2],
        gap=24,
    )
    listed = ", ".join(map(str, part.maps))
    caption = f"{part.layer}, maps {listed}: projections left, patches of the images right; scales at each map."
    alt = f"For the maps {listed} of {part.layer}: a square of projections beside a square of image patches."
    name = f"{part.layer}-{ordinal}"
    return Sheet(name, f"visualize/top/{name}", image, caption, alt, table=table)


def _rows(found: TopActivations, rows: Sequence[int]) -> TopActivations:
    maps = tuple(found.maps[row] for row in rows)
    index = list(rows)
    return TopActivations(found.layer, maps, found.values[index], found.images[index], found.positions[index])


def _patches_of(patches: TopPatches, rows: Sequence[int]) -> TopPatches:
    index = list(rows)
    return TopPatches(patches.projections[index], patches.patches[index])
