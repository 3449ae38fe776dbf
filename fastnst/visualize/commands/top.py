"""`fastnst visualize top`: each map's strongest activations in a folder."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import torch

from fastnst.data.manifest import Manifest, build_manifest
from fastnst.device import resolve_device
from fastnst.images import MIN_SIDE, printable
from fastnst.models.vgg19 import VGG19
from fastnst.progress import counted
from fastnst.visualize.attribution.folder_batches import LOADERS, CenterCrops
from fastnst.visualize.attribution.targets import check_at_least_one, check_choice
from fastnst.visualize.attribution.top_activations import TopActivations, TopPatches, find_top_activations, project_top
from fastnst.visualize.commands import options
from fastnst.visualize.deconv.receptive_field import receptive_field
from fastnst.visualize.sheets.page import Figure
from fastnst.visualize.sheets.render import Row, about_grey, colour_scale, contact_sheet, mosaic, number
from fastnst.visualize.sheets.report import Report

log = logging.getLogger(__name__)

MAPS_PER_SHEET = 16
_COLUMNS = 2
_MAX_BYTES = 1 << 30  # of projections and patches in memory
_REJECTED_LOGGED = 5

_HOW_TO_READ = (
    "For each feature map its strongest activations in the whole folder, one per image: left their projections back "
    "to pixels, grey being zero and each map having a scale of its own; right the receptive field of the activation in "
    "the image, strongest first (Zeiler & Fergus 2014, Figure 2)."
)


def top_report(
    folder: Path,
    layer: str,
    *,
    maps: str,
    count: int,
    size: int | None,
    loader: str,
    vgg: str,
    device: str,
) -> Report:
    """Draw each map's `count` strongest activations: projections beside patches of the images.

    Raises:
        UserError, DataError, DeviceError: as `deconvnet_report`.
    """
    choice = options.parse_maps(maps)
    options.check_vgg_layers([layer], choice)
    field = receptive_field(layer)
    side = options.vgg_size([layer], size)
    check_choice("loader", loader, LOADERS)
    check_at_least_one("--count", count)
    torch_device = resolve_device(device)
    manifest = _read_manifest(folder, layer)
    with options.memory_errors(torch_device, "--size, --count or the number of --maps", side):
        net = options.load_vgg(vgg, [layer], torch_device)
        at_once = options.batch_that_fits(torch_device, side, CenterCrops.batch_size)
        crops = CenterCrops(manifest, side, torch_device, loader, batch_size=at_once)
        with counted(f"top of {layer}", "images") as progress:
            found = find_top_activations(net, crops, layer, choice.numbers, count=count, progress=progress)
        if choice.numbers is None:
            found = found.select(choice.of(layer, found.values[:, 0]))
        figures = _figures(net, crops, found)
    settings = {
        "folder": f"{printable(manifest.folder)}, {len(manifest.images)} images",
        "layer": layer,
        "maps": choice.text,
        "count": f"{count} strongest activations per map",
        "size": f"{side} × {side} px, center crop of each image",
        "receptive field": f"{field.size} × {field.size} px",
        **options.weights_setting(vgg, net),
    }
    return Report(f"{layer} of VGG19: strongest activations", _HOW_TO_READ, settings, figures)


def _read_manifest(folder: Path, layer: str) -> Manifest:
    smallest = max(MIN_SIDE, options.field_of(layer) or 0)
    with counted("check", "images") as progress:
        manifest = build_manifest(folder, progress=progress, min_side=smallest)
    for rejected in manifest.rejected[:_REJECTED_LOGGED]:
        log.info("passed over: %s: %s", printable(rejected.path), rejected.reason)
    if len(manifest.rejected) > _REJECTED_LOGGED:
        log.info("passed over: %d more images", len(manifest.rejected) - _REJECTED_LOGGED)
    return manifest


def _figures(net: VGG19, crops: CenterCrops, found: TopActivations) -> list[Figure]:
    """Project and draw, as many maps at a time as `_MAX_BYTES` allow."""
    layer, (total, count) = found.layer, found.values.shape
    side = receptive_field(layer).size
    at_once = max(1, _MAX_BYTES // (24 * count * side * side * MAPS_PER_SHEET)) * MAPS_PER_SHEET
    figures: list[Figure] = []
    for start in range(0, total, at_once):
        part = found.select(range(start, min(start + at_once, total)))
        with counted(f"project {layer}", "images") as progress:
            patches = project_top(net, crops, part, progress=progress)
        for first in range(0, len(part.maps), MAPS_PER_SHEET):
            rows = range(first, min(first + MAPS_PER_SHEET, len(part.maps)))
            figures.append(
                _figure(crops.manifest, part.select(rows), patches.select(rows), f"{layer}-{len(figures) + 1}")
            )
    if len(figures) == 1:
        return [replace(figures[0], name=layer, tag=f"visualize/top/{layer}")]
    return figures


def _figure(manifest: Manifest, part: TopActivations, patches: TopPatches, name: str) -> Figure:
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
        note="Left of each pair the projections, grey = 0; right the patches of the images, strongest first.",
        largest=cells[0].shape[2],
        gap=24,
    )
    listed = ", ".join(map(str, part.maps))
    caption = f"{part.layer}, maps {listed}: projections left, patches of the images right; scales at each map."
    alt = f"For the maps {listed} of {part.layer}: a square of projections beside a square of image patches."
    return Figure(name, f"visualize/top/{name}", image, caption, alt, table=table)
