"""What `fastnst visualize …` does, from names of files and options to a report; writing it is `report.write_report`'s.

Options are checked first, then images are read, then weights: what is cheap to refuse is refused at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastnst.data.manifest import Manifest, build_manifest
from fastnst.device import resolve_device
from fastnst.errors import DataError, UserError
from fastnst.images import MIN_SIDE, printable
from fastnst.models.transform_net import TransformNet
from fastnst.models.vgg19 import VGG19, deepest_layer
from fastnst.models.weights import load_vgg19
from fastnst.progress import counted
from fastnst.visualize.attribution.folder_batches import LOADERS
from fastnst.visualize.attribution.occlusion import FILLS
from fastnst.visualize.attribution.saliency import METHODS
from fastnst.visualize.attribution.targets import CLASS_LAYER, Target, check_choice, parse_target
from fastnst.visualize.commands import heat_maps, projections
from fastnst.visualize.commands import top as strongest
from fastnst.visualize.commands.options import (
    check_size,
    check_vgg_layers,
    field_of,
    parse_activation,
    parse_maps,
    read_crops,
    vgg_size,
)
from fastnst.visualize.deconv.receptive_field import receptive_field
from fastnst.visualize.sheets.report import Report, memory_errors

Notify = Callable[[str], None]

TRANSFORM_SIZE = 256
_REFUSALS_NAMED = 5


def deconvnet(
    images: Sequence[Path],
    layers: Sequence[str],
    *,
    maps: str,
    activation: str,
    size: int | None,
    vgg: str,
    device: str,
    notify: Notify,
) -> Report:
    """VGG19's maps on images, projected back to pixels.

    Raises:
        UserError: an option or a combination of options that cannot be used.
        DataError: an image or the weights cannot be used.
        DeviceError: no such device, or too little memory.
    """
    choice, seed = parse_maps(maps), parse_activation(activation)
    if not layers:
        raise UserError("no layer was named; give --layer conv3_4, for example")
    layers = check_vgg_layers(layers, choice)
    size = vgg_size(layers, size)
    where = resolve_device(device)
    squares = read_crops(images, size, layers)
    with memory_errors(_advice(where, "--size or the number of --maps")):
        net = _load(vgg, layers, where, notify)
        report = projections.deconvnet(net, images, squares, layers, maps=choice, activation=seed)
    return _with_weights(report, vgg, net)


def top(
    folder: Path,
    layer: str,
    *,
    maps: str,
    count: int,
    size: int | None,
    loader: str,
    vgg: str,
    device: str,
    notify: Notify,
) -> Report:
    """What excites VGG19's maps most in a folder. Raises as `deconvnet` does."""
    choice = parse_maps(maps)
    check_vgg_layers([layer], choice)
    receptive_field(layer)
    side = vgg_size([layer], size)
    check_choice("loader", loader, LOADERS)
    if count < 1:
        raise UserError(f"--count {count} shows nothing; give 1 or more")
    where = resolve_device(device)
    manifest = _read_manifest(folder, layer, notify)
    with memory_errors(_advice(where, "--size, --count or the number of --maps")):
        net = _load(vgg, [layer], where, notify)
        report = strongest.top(net, manifest, layer, maps=choice, count=count, size=side, loader=loader, device=where)
    return _with_weights(report, vgg, net)


def saliency(
    images: Sequence[Path],
    target: str,
    *,
    method: str,
    samples: int | None,
    noise: float | None,
    size: int | None,
    vgg: str,
    device: str,
    notify: Notify,
) -> Report:
    """Where in images a target is sensitive to the pixels. Raises as `deconvnet` does."""
    check_choice("saliency method", method, METHODS)
    for name, value in (("--samples", samples), ("--noise", noise)):
        if value is not None and method != "smoothgrad":
            raise UserError(f"{name} is for --method smoothgrad, not for {method}; leave it out")
    chosen = parse_target(target)
    size = vgg_size([chosen.layer], size)
    where = resolve_device(device)
    squares = read_crops(images, size, [chosen.layer])
    with memory_errors(_advice(where, "--size")):
        net = _load_for(chosen, vgg, where, notify)
        report = heat_maps.saliency(
            net,
            images,
            squares,
            chosen,
            method=method,
            samples=25 if samples is None else samples,
            noise=0.15 if noise is None else noise,
        )
    return _with_weights(report, vgg, net)


def occlusion(
    images: Sequence[Path],
    target: str,
    *,
    patch: int,
    stride: int,
    fill: str,
    size: int | None,
    vgg: str,
    device: str,
    notify: Notify,
) -> Report:
    """What a target loses when parts of images are covered. Raises as `deconvnet` does."""
    check_choice("fill", fill, FILLS)
    chosen = parse_target(target)
    size = vgg_size([chosen.layer], size)
    where = resolve_device(device)
    squares = read_crops(images, size, [chosen.layer])
    with memory_errors(_advice(where, "--size")):
        net = _load_for(chosen, vgg, where, notify)
        report = heat_maps.occlusion(net, images, squares, chosen, patch=patch, stride=stride, fill=fill)
    return _with_weights(report, vgg, net)


def transform(
    load: Callable[[torch.device], TransformNet],
    model: str,
    images: Sequence[Path],
    layers: Sequence[str],
    *,
    maps: str | None,
    size: int | None,
    device: str,
) -> Report:
    """The transform net from photo to painting.

    Args:
        load: gives the network on a device.
        model: what to call it.
        images: the files.
        layers: which to show; none named: all.
        maps: maps of these layers to show as well.
        size: side of the squares in pixels; None: 256.
        device: `auto`, `cuda` or `cpu`.

    Raises:
        UserError, DataError, DeviceError: as `deconvnet`.
    """
    choice = None if maps is None else parse_maps(maps)
    size = TRANSFORM_SIZE if size is None else check_size(size)
    where = resolve_device(device)
    squares = read_crops(images, size)
    with memory_errors(_advice(where, "--size or the number of --maps")):
        net = load(where)
        report = projections.transform(net, images, squares, layers or net.layer_names, maps=choice)
    settings = {"model": f"{model}: {net.architecture}, {net.norm} norm", **report.settings}
    return replace(report, settings=settings)


def _load(vgg: str, layers: Sequence[str], device: torch.device, notify: Notify) -> VGG19:  # noqa: ARG001
    return load_vgg19(vgg, last_layer=deepest_layer(layers)).to(device)


def _load_for(target: Target, vgg: str, device: torch.device, notify: Notify) -> VGG19:
    if target.layer != CLASS_LAYER:
        return _load(vgg, [target.layer], device, notify)
    other = "or a target layer:map, such as relu3_4:17"
    if vgg == "random":
        raise DataError(
            f"random weights know no classes, and the target is {target.name}; give --vgg auto or FILE, {other}"
        )
    try:
        return _load(vgg, [target.layer], device, notify)
    except DataError as error:
        raise DataError(f"{target.name} needs VGG19 with its classifier: {error}; {other}") from error


def _read_manifest(folder: Path, layer: str, notify: Notify) -> Manifest:
    smallest = max(MIN_SIDE, field_of(layer) or 0)
    with counted("check", "images") as progress:
        manifest = build_manifest(folder, progress=progress, min_side=smallest)
    if manifest.rejected:
        for refused in manifest.rejected[:_REFUSALS_NAMED]:
            notify(f"passed over: {printable(refused.path)}: {refused.reason}")
        if len(manifest.rejected) > _REFUSALS_NAMED:
            notify(f"passed over: {len(manifest.rejected) - _REFUSALS_NAMED} more images")
    return manifest


def _with_weights(report: Report, vgg: str, net: VGG19) -> Report:
    return replace(report, settings={**report.settings, "VGG19": f"{printable(vgg)}, {net.flavour} flavour"})


def _advice(device: torch.device, what: str) -> str:
    return f"lower {what}{', or use --device cpu' if device.type == 'cuda' else ''}"
