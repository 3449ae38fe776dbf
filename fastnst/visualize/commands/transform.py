"""`fastnst visualize transform`: from photo to stylized output (the paper's Figure 2)."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from fastnst.device import resolve_device
from fastnst.models.transform_net import TransformNet
from fastnst.progress import ProgressReport
from fastnst.visualize.commands import options
from fastnst.visualize.deconv.receptive_field import check_size
from fastnst.visualize.deconv.transform_net import TransformDeconvnet
from fastnst.visualize.sheets.page import Figure
from fastnst.visualize.sheets.projection_figures import HOW_TO_READ, Crop, map_figures, strip_figure
from fastnst.visualize.sheets.report import Report, image_names

DEFAULT_SIZE = 256
# Without it, projections of the last layers all end as the same blob.
_RENORMALISED = "On the way back each norm normalises the signal by its own statistics, as it does on the way up."


def transform_report(
    load: Callable[[torch.device], TransformNet],
    model: str,
    images: Sequence[Path],
    layers: Sequence[str],
    *,
    maps: str | None,
    size: int | None,
    device: str,
) -> Report:
    """Draw a strip per image, and sheets of single maps if asked.

    Args:
        load: loads the network to a device.
        model: its name, for the page.
        images: the files.
        layers: to show; none: all.
        maps: of these layers to show as well, all positions of each together; None: none.
        size: side of the crops in pixels; None: 256.

    Raises:
        UserError, DataError, DeviceError: as `deconvnet_report`.
    """
    choice = None if maps is None else options.parse_maps(maps)
    size = DEFAULT_SIZE if size is None else check_size(size)
    torch_device = resolve_device(device)
    crops = options.read_crops(images, size)
    figures: list[Figure] = []
    with options.memory_errors(torch_device, "--size or the number of --maps"):
        net = load(torch_device)
        deconvnet, weight = TransformDeconvnet(net), next(net.parameters())
        channels = {layer: deconvnet.channels(layer) for layer in layers or net.layer_names}
        layers = [layer for layer in net.layer_names if layer in channels]
        per_image = 1 if choice is None else sum(choice.count(channels[layer]) for layer in layers)
        unit = "images" if choice is None else "maps"
        with ProgressReport("transform", len(crops) * per_image, unit) as progress:
            for path, name, pixels in zip(images, image_names(images), crops, strict=True):
                crop = Crop("transform", "the transform net", path, name, pixels.to(weight))
                recording = deconvnet.record(crop.pixels, layers)
                with torch.no_grad():
                    output = net(crop.pixels).clamp(0, 1)
                whole = {layer: deconvnet.project_layer(recording, layer, renormalise=True) for layer in layers}
                figures.append(strip_figure(crop, whole, output))
                if choice is None:
                    progress.advance()
                    continue
                for layer in layers:
                    activations = recording.activations[layer]
                    figures += map_figures(
                        crop,
                        layer,
                        activations,
                        choice.neurons(layer, activations, "all"),
                        partial(deconvnet.project, recording, layer, renormalise=True),
                        activation="all",
                        field=None,
                        progress=progress,
                    )
    settings = {"model": f"{model}: {net.architecture}, {net.norm} norm", "layers": ", ".join(layers)}
    settings |= options.size_setting(crops[0]) | {"maps": "none" if choice is None else choice.text}
    return Report("Transform net: from photo to stylized output", f"{HOW_TO_READ} {_RENORMALISED}", settings, figures)
