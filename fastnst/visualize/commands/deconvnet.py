"""`fastnst visualize deconvnet`: VGG19's maps, projected back to pixels (Zeiler & Fergus 2014)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from fastnst.device import resolve_device
from fastnst.errors import UserError
from fastnst.progress import ProgressReport
from fastnst.visualize.attribution.targets import channels_of
from fastnst.visualize.commands import options
from fastnst.visualize.deconv.receptive_field import ReceptiveField, receptive_field
from fastnst.visualize.deconv.vgg import Deconvnet
from fastnst.visualize.sheets.page import Figure
from fastnst.visualize.sheets.projection_figures import (
    HOW_TO_READ,
    Crop,
    describe_activation,
    map_figures,
    strip_figure,
)
from fastnst.visualize.sheets.report import Report, image_names


def deconvnet_report(
    images: Sequence[Path],
    layers: Sequence[str],
    *,
    maps: str,
    activation: str,
    size: int | None,
    vgg: str,
    device: str,
) -> Report:
    """Draw a sheet of maps per image and layer, and over several layers a strip per image.

    Raises:
        UserError: an option or a combination of options that cannot be used.
        DataError: an image or the weights cannot be used.
        DeviceError: no such device, or too little memory.
    """
    choice, chosen = options.parse_maps(maps), options.parse_activation(activation)
    if not layers:
        raise UserError("no layer was given; give --layer conv3_4, for example")
    layers = options.check_vgg_layers(layers, choice)
    size = options.vgg_size(layers, size)
    torch_device = resolve_device(device)
    crops = options.read_crops(images, size, layers)
    total = len(crops) * sum(choice.count(channels_of(layer)) for layer in layers)
    figures: list[Figure] = []
    with options.memory_errors(torch_device, "--size or the number of --maps", size):
        net = options.load_vgg(vgg, layers, torch_device)
        deconvnet = Deconvnet(net)
        with ProgressReport("deconvnet", total, "maps") as progress:
            for path, name, pixels in zip(images, image_names(images), crops, strict=True):
                crop = Crop("deconvnet", "VGG19", path, name, pixels.to(net.mean))
                recording = deconvnet.record(crop.pixels, layers)
                if len(layers) > 1:
                    figures.append(
                        strip_figure(crop, {layer: deconvnet.project_layer(recording, layer) for layer in layers})
                    )
                for layer in layers:
                    activations = recording.activations[layer]
                    figures += map_figures(
                        crop,
                        layer,
                        activations,
                        choice.neurons(layer, activations, chosen),
                        partial(deconvnet.project, recording, layer),
                        activation=chosen,
                        field=_close_up(layer, crop.pixels),
                        progress=progress,
                    )
    settings = {"layers": ", ".join(layers)} | options.size_setting(crops[0])
    settings |= {"maps": choice.text, "activation": describe_activation(chosen)} | options.weights_setting(vgg, net)
    return Report("VGG19: deconvnet projections", HOW_TO_READ, settings, figures)


def _close_up(layer: str, pixels: Tensor) -> ReceptiveField | None:
    """Return the receptive field if it is a small part of the image, worth a close-up."""
    if options.field_of(layer) is None:
        return None
    field = receptive_field(layer)
    return field if 2 * field.size <= min(pixels.shape[2:]) else None
