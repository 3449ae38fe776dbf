"""How what the networks see changes while the transform net learns: the same projections, step after step.

Source: Zeiler & Fergus 2014, §4.1 and Figure 4: the strongest activation of a feature map, projected to pixels, through
training. Two networks are watched on fixed photos: VGG19, whose weights are fixed, looking at the *stylised*
image as that changes; and the transform net, whose weights change. Of its maps all activations are projected
together, renormalised on the way: a single one of a deep layer arrives as a blob (see `transform_deconvnet`).
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastnst.config import VisualizeConfig
from fastnst.images import to_tensor
from fastnst.models.transform_net import LAYER_NAMES, TransformNet
from fastnst.models.vgg19 import VGG19
from fastnst.visualize.deconv.neurons import Seeds, check_maps
from fastnst.visualize.deconv.transform_net import TransformDeconvnet
from fastnst.visualize.deconv.vgg import Deconvnet
from fastnst.visualize.sheets.render import about_grey, colour_scale
from fastnst.visualize.sheets.strips import layer_strip


class ProjectionMonitor:
    """Watches both networks on fixed images.

    Args:
        net: the transform net; each look sees its weights of that moment.
        vgg: the loss network, deep enough for the watched layers.
        config: which maps of which layers.
        loss_layers: layers that the loss taps, in each of which the map that answers the first photo most strongly
            is watched, where the configuration names no map of VGG19.
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
        self._check(self._transform_deconvnet, self._transform_maps)
        self._check(self._vgg_deconvnet, self._vgg_maps)

    def look(self) -> Iterator[tuple[str, Tensor]]:
        """The projections of this moment.

        Yields:
            A tag and an image `[3, H, W]` in [0, 1] on the CPU: projections, `evolution/NETWORK/LAYER_mapN/NAME`, each
            scaled about zero = grey by its own largest values; and per image the strip from the photo through
            the transform net's layers to the painting (the paper's Figure 2), `strip/transform_net/NAME`.
        """
        for row, name in enumerate(self._names):
            photo = self._images[row : row + 1]
            painting = self._paint(photo)
            yield from self._look_at_transform_net(photo, painting, name)
            yield from self._look_at_vgg(painting, name)

    def content_strips(self) -> Iterator[tuple[str, Tensor]]:
        """What VGG19's loss layers see in each photo (the paper's Figure 3), as `strip/vgg_content/NAME`.

        Training does not change it: once is enough. Yields as `look` does.
        """
        for row, name in enumerate(self._names):
            photo = self._images[row : row + 1]
            recording = self._vgg_deconvnet.record(photo, self._loss_layers)
            layers = {layer: self._vgg_deconvnet.project_layer(recording, layer) for layer in self._loss_layers}
            yield f"strip/vgg_content/{name}", to_tensor(layer_strip(photo, layers))[0]

    def _look_at_transform_net(self, photo: Tensor, painting: Tensor, name: str) -> Iterator[tuple[str, Tensor]]:
        deconvnet = self._transform_deconvnet
        recording = deconvnet.record(photo, LAYER_NAMES)
        layers = {layer: deconvnet.project_layer(recording, layer, renormalise=True) for layer in LAYER_NAMES}
        for layer, number in self._transform_maps:
            projection = layers[layer]
            if number is not None:
                seeds = Seeds.every_position([0], [number], photo.device)
                projection = deconvnet.project(recording, layer, seeds, renormalise=True)
            yield f"evolution/transform_net/{_tag(layer, number)}/{name}", _image(projection)
        yield f"strip/transform_net/{name}", to_tensor(layer_strip(photo, layers, painting))[0]

    def _look_at_vgg(self, painting: Tensor, name: str) -> Iterator[tuple[str, Tensor]]:
        recording = self._vgg_deconvnet.record(painting, _layers(self._vgg_maps))
        for layer, number in self._vgg_maps:
            if number is None:
                projection = self._vgg_deconvnet.project_layer(recording, layer)
            else:
                seeds = Seeds.strongest(recording.activations[layer], [0], [number])
                projection = self._vgg_deconvnet.project(recording, layer, seeds)
            yield f"evolution/vgg_transformed/{_tag(layer, number)}/{name}", _image(projection)

    def _strongest_maps(self) -> list[tuple[str, int | None]]:
        recording = self._vgg_deconvnet.record(self._images[:1], self._loss_layers)
        return [
            (layer, int(recording.activations[layer][0].flatten(1).amax(1).argmax())) for layer in self._loss_layers
        ]

    def _check(self, deconvnet: Deconvnet | TransformDeconvnet, watched: Sequence[tuple[str, int | None]]) -> None:
        maps: list[tuple[str, int]] = [(layer, number) for layer, number in watched if number is not None]
        if maps:
            recording = deconvnet.record(self._images[:1], _layers(maps))
            for layer, number in maps:
                check_maps(layer, [number], recording.activations[layer].shape[1])

    def _paint(self, photo: Tensor) -> Tensor:
        was_training = self._net.training
        self._net.eval()
        try:
            with torch.no_grad():
                return self._net(photo).clamp_(0, 1)
        finally:
            self._net.train(was_training)


def _parse(name: str) -> tuple[str, int | None]:
    """`relu3_1:17` → that map of the layer; `relu3_1` → the layer and None, all of its maps."""
    layer, _, number = name.partition(":")
    return layer, int(number) if number else None


def _layers(watched: Iterable[tuple[str, int | None]]) -> list[str]:
    return list(dict.fromkeys(layer for layer, _ in watched))


def _tag(layer: str, number: int | None) -> str:
    return layer if number is None else f"{layer}_map{number}"


def _image(projection: Tensor) -> Tensor:
    return about_grey(projection, colour_scale(projection))[0].cpu()
