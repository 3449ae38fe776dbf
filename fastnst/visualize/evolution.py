"""Projections of fixed photos that show how the features change while the transform net trains.

Source: Zeiler & Fergus 2014, §4.1 and Figure 4: the strongest activation of a feature map, projected to pixels, through
training. Two networks are monitored: VGG19, with fixed weights, on the *stylized* image as that changes; and the
transform net, with changing weights, on the photo. Of its maps all activations are projected together, renormalised on
the way: a single one of a deep layer ends as a blob (see `deconv/transform_net.py`).
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastnst.config import VisualizeConfig
from fastnst.images import to_tensor
from fastnst.models.transform_net import LAYER_NAMES, TransformNet
from fastnst.models.vgg19 import VGG19
from fastnst.visualize.deconv.neurons import Neurons, check_maps
from fastnst.visualize.deconv.transform_net import TransformDeconvnet
from fastnst.visualize.deconv.vgg import Deconvnet
from fastnst.visualize.sheets.layer_strip import layer_strip
from fastnst.visualize.sheets.render import about_grey, colour_scale

_Map = tuple[str, int | None]
"""A layer and one of its maps; None: all of them together."""


class ProjectionMonitor:
    """Projects maps of both networks on fixed images.

    Args:
        net: the transform net; projections use its current weights.
        vgg: the loss network, deep enough for the monitored layers.
        config: maps to monitor.
        loss_layers: layers of the loss. Where the configuration names no map of VGG19, the map of each with the
            strongest activation on the first photo is monitored.
        images: `[P, 3, H, W]`, P ≥ 1, RGB in [0, 1], on any device.
        names: P names, which become the ends of the tags.

    Raises:
        UserError: a layer lies behind the end of `vgg`, or has no such map.
    """

    def __init__(
        self,
        net: TransformNet,
        vgg: VGG19,
        config: VisualizeConfig,
        *,
        loss_layers: Sequence[str],
        images: Tensor,
        names: Sequence[str],
    ) -> None:
        device = next(net.parameters()).device
        self._net = net
        self._images, self._names = images.to(device, torch.float32), list(names)
        self._vgg_deconvnet, self._transform_deconvnet = Deconvnet(vgg), TransformDeconvnet(net)
        self._loss_layers = [layer for layer in vgg.layers if layer in loss_layers]
        self._transform_maps = [_parse(name) for name in config.transform_maps]
        self._vgg_maps = [_parse(name) for name in config.vgg_maps] or self._strongest_maps()
        _check(self._transform_deconvnet, self._transform_maps)
        _check(self._vgg_deconvnet, self._vgg_maps)

    def projections(self) -> Iterator[tuple[str, Tensor]]:
        """Project with the current weights.

        Yields:
            A tag and an image `[3, H, W]` in [0, 1] on the CPU: projections, `evolution/NETWORK/LAYER_mapN/NAME`, each
            scaled about zero = grey by its own largest values; and per image the strip from the photo through the
            transform net's layers to the output (the paper's Figure 2), `strip/transform_net/NAME`.
        """
        for row, name in enumerate(self._names):
            photo = self._images[row : row + 1]
            output = self._stylize(photo)
            yield from self._project_transform_net(photo, output, name)
            yield from self._project_vgg(output, name)

    def content_strips(self) -> Iterator[tuple[str, Tensor]]:
        """Project VGG19's loss layers on each photo (the paper's Figure 3), as `strip/vgg_content/NAME`.

        Training does not change them: once is enough. Yields as `projections` does.
        """
        for row, name in enumerate(self._names):
            photo = self._images[row : row + 1]
            recording = self._vgg_deconvnet.record(photo, self._loss_layers)
            layers = {layer: self._vgg_deconvnet.project_layer(recording, layer) for layer in self._loss_layers}
            yield f"strip/vgg_content/{name}", to_tensor(layer_strip(photo, layers))[0]

    def _project_transform_net(self, photo: Tensor, output: Tensor, name: str) -> Iterator[tuple[str, Tensor]]:
        deconvnet = self._transform_deconvnet
        recording = deconvnet.record(photo, LAYER_NAMES)
        layers = {layer: deconvnet.project_layer(recording, layer, renormalise=True) for layer in LAYER_NAMES}
        for layer, number in self._transform_maps:
            projection = layers[layer]
            if number is not None:
                neurons = Neurons.every_position([0], [number], photo.device)
                projection = deconvnet.project(recording, layer, neurons, renormalise=True)
            yield f"evolution/transform_net/{_tag(layer, number)}/{name}", _image(projection)
        yield f"strip/transform_net/{name}", to_tensor(layer_strip(photo, layers, output))[0]

    def _project_vgg(self, output: Tensor, name: str) -> Iterator[tuple[str, Tensor]]:
        recording = self._vgg_deconvnet.record(output, _layers(self._vgg_maps))
        for layer, number in self._vgg_maps:
            if number is None:
                projection = self._vgg_deconvnet.project_layer(recording, layer)
            else:
                neurons = Neurons.strongest(recording.activations[layer], [0], [number])
                projection = self._vgg_deconvnet.project(recording, layer, neurons)
            yield f"evolution/vgg_transformed/{_tag(layer, number)}/{name}", _image(projection)

    def _strongest_maps(self) -> list[_Map]:
        recording = self._vgg_deconvnet.record(self._images[:1], self._loss_layers)
        return [
            (layer, int(recording.activations[layer][0].flatten(1).amax(1).argmax())) for layer in self._loss_layers
        ]

    def _stylize(self, photo: Tensor) -> Tensor:
        was_training = self._net.training
        self._net.eval()
        try:
            with torch.no_grad():
                output: Tensor = self._net(photo)
                return output.clamp_(0, 1)
        finally:
            self._net.train(was_training)


def _check(deconvnet: Deconvnet | TransformDeconvnet, maps: Iterable[_Map]) -> None:
    for layer, number in maps:
        check_maps(layer, [] if number is None else [number], deconvnet.channels(layer))


def _parse(name: str) -> _Map:
    """Parse `relu3_1:17`, one map of a layer, or `relu3_1`, all of them."""
    layer, _, number = name.partition(":")
    return layer, int(number) if number else None


def _layers(maps: Iterable[_Map]) -> list[str]:
    return list(dict.fromkeys(layer for layer, _ in maps))


def _tag(layer: str, number: int | None) -> str:
    return layer if number is None else f"{layer}_map{number}"


def _image(projection: Tensor) -> Tensor:
    return about_grey(projection, colour_scale(projection))[0].cpu()
