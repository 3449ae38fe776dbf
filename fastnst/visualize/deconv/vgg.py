"""Deconvnet for VGG19: what in an image has caused an activation (Zeiler & Fergus 2014, §2.1).

Legend: K seeds, that is pairs of an image and a feature map; [K, C, h, w] a signal on its way from a layer's map of
h×w to the pixels.

Each layer has its counterpart, applied from the seed's layer down to the pixels, everything but the seed being zero:

    convolution      the transposed filter, without bias
    ReLU             ReLU of the signal itself
    max pooling      unpooling with the switches of the forward pass
    fully connected  the transposed matrix; of fc6 also the adjoint of its averaging to 7×7
    preprocessing    the adjoint of its linear part: the channels' gain and order

So a projection is an input gradient, but for the ReLUs: there the gradient stops where the forward pass was negative,
the deconvnet where the signal is. Without them (`rectify=False`) it is the exact adjoint of the net's linear part.

A seed with a position reaches only its receptive field. Its signal is therefore kept as a window, which grows from 1×1
by 2 with each convolution and twofold with each pooling, for as long as that is smaller than the map. What of a window
lies outside the map is cleared after each layer, so that borders are exact, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst.errors import UserError
from fastnst.models.vgg19 import VGG19, check_layer
from fastnst.visualize.deconv import transposed, windows
from fastnst.visualize.deconv.neurons import Seeds, check_maps
from fastnst.visualize.deconv.receptive_field import receptive_field


@dataclass(frozen=True)
class Recording:
    """What one forward pass leaves behind for any number of projections.

    Attributes:
        activations: the asked layers' outputs, `[N, C, h, w]` channels_last, or `[N, C]` from fc6 on.
        size: height and width of the images.
        switches: of each pool below the deepest asked layer, `[N, C, h, w]` uint8.
        input_sizes: height and width of what each of these pools, and fc6, was given.
    """

    activations: dict[str, Tensor]
    size: tuple[int, int]
    switches: dict[str, Tensor]
    input_sizes: dict[str, tuple[int, int]]


class Deconvnet:
    """Projects activations of a VGG19 back to pixels; the net stays as it is.

    Args:
        net: in any floating-point type, on any device; projections are in that type and on that device.
    """

    def __init__(self, net: VGG19) -> None:
        self.net = net
        self.layers: tuple[str, ...] = net.layers

    def channels(self, layer: str) -> int:
        """How many feature maps a layer has.

        Raises:
            UserError: unknown layer, or one behind the net's last.
        """
        self._check_layer(layer)
        below = [name for name in self.layers[: self.layers.index(layer) + 1] if name.startswith(("conv", "fc"))]
        return self._weight(below[-1]).shape[0]

    @torch.no_grad()
    def record(self, images: Tensor, layers: Sequence[str]) -> Recording:
        """One forward pass.

        Args:
            images: `[N, 3, H, W]`, RGB in [0, 1].
            layers: whose activations to keep, at least one.

        Raises:
            UserError: a layer is unknown or behind the net's last, or the images are too small for the deepest.
        """
        depth = self.net.check(images, layers)
        activations: dict[str, Tensor] = {}
        switches: dict[str, Tensor] = {}
        input_sizes: dict[str, tuple[int, int]] = {}
        x = self.net.preprocess(images)
        kept = True
        for name in self.layers[: depth + 1]:
            if name.startswith("pool") or name == "fc6":
                input_sizes[name] = (x.shape[2], x.shape[3])
            if name.startswith("pool"):
                x, switches[name] = self.net.get_submodule(name)(x, switches=True)
            elif name.startswith("relu") and not kept:
                x = self.net.get_submodule(name)(x, inplace=True)
            else:
                x = self.net.get_submodule(name)(x)
            kept = name in layers
            if kept:
                activations[name] = x
        return Recording(activations, (images.shape[2], images.shape[3]), switches, input_sizes)

    @torch.no_grad()
    def project(
        self, recording: Recording, layer: str, seeds: Seeds, *, batch_size: int = 16, rectify: bool = True
    ) -> Tensor:
        """Each seed by itself, down to pixels.

        Args:
            recording: holds `layer`.
            layer: where the seeds are.
            seeds: K of them.
            batch_size: how many whole images' worth of signal to carry at once; of small windows, more fit in.
            rectify: apply the ReLUs.

        Returns:
            `[K, 3, H, W]`: for each pixel and RGB channel a number of either sign, in units of activation.

        Raises:
            UserError: `layer` is unknown or not recorded, or a seed names an image, map or position that is not there.
        """
        activations = self._check(recording, layer, seeds)
        seeds = seeds.to(activations.device)
        height, width = recording.size
        if seeds.positions is not None and activations.ndim == 4:
            batch_size *= max(1, height * width // receptive_field(layer).size ** 2)
        projections = activations.new_zeros((len(seeds), 3, height, width))
        for start in range(0, len(seeds), batch_size):
            part = slice(start, start + batch_size)
            signal = self._walk(recording, layer, transposed.seeded(activations, seeds[part]), rectify)
            if signal.corners is None:
                projections[part] = signal.values
            else:
                windows.put_back(signal.values, signal.corners, projections[part])
        return projections

    @torch.no_grad()
    def project_patches(
        self, recording: Recording, layer: str, seeds: Seeds, *, batch_size: int = 256, rectify: bool = True
    ) -> tuple[Tensor, Tensor]:
        """As `project`, cropped to what each seed sees: all of a projection that is not zero.

        Args:
            recording: holds `layer`.
            layer: up to pool5.
            seeds: K of them, with positions.
            batch_size: how many seeds to carry at once.
            rectify: apply the ReLUs.

        Returns:
            patches: `[K, 3, s, s]`, s being the size of the layer's receptive field; 0 outside the image.
            corners: `[K, 2]` int64, row and column of the image at which each begins; may be negative.

        Raises:
            UserError: as in `project`; the seeds have no positions; or `layer` is fully connected.
        """
        activations = self._check(recording, layer, seeds)
        field = receptive_field(layer)
        if seeds.positions is None:
            raise UserError("a patch is what one position sees, and these seeds have none; use Seeds.at or .strongest")
        seeds = seeds.to(activations.device)
        assert seeds.positions is not None
        corners = seeds.positions * field.jump + field.start
        cropped = activations.new_zeros((len(seeds), 3, field.size, field.size))
        for start in range(0, len(seeds), batch_size):
            part = slice(start, start + batch_size)
            signal = self._walk(recording, layer, transposed.seeded(activations, seeds[part]), rectify)
            whole = signal.corners is None
            cropped[part] = windows.cut(signal.values, corners[part], field.size) if whole else signal.values
        return cropped, corners

    @torch.no_grad()
    def project_layer(self, recording: Recording, layer: str, *, batch_size: int = 16, rectify: bool = True) -> Tensor:
        """All activations of a layer together, image by image: `[N, 3, H, W]`; otherwise as `project`."""
        self._check_layer(layer)
        activations = self._recorded(recording, layer)
        count = activations.shape[0]
        projections = activations.new_zeros((count, 3, *recording.size))
        for start in range(0, count, batch_size):
            signal = transposed.whole(activations, start, min(start + batch_size, count))
            projections[start : start + batch_size] = self._walk(recording, layer, signal, rectify).values
        return projections

    def __call__(
        self, images: Tensor, layer: str, maps: Sequence[int], *, seed: str | tuple[int, int] = "strongest"
    ) -> Tensor:
        """Projections of some maps of a layer, for each of the images, by one forward pass.

        Args:
            images: `[N, 3, H, W]`, RGB in [0, 1].
            layer: where to start from.
            maps: M channels of it.
            seed: `strongest`, `all` activations of the map, or the row and column of one.

        Returns:
            `[N, M, 3, H, W]`.

        Raises:
            UserError: unknown layer, map, seed or position, or the images are too small for the layer.
        """
        check_maps(layer, maps, self.channels(layer))
        recording = self.record(images, [layer])
        activations = recording.activations[layer]
        count = len(images)
        rows = [row for row in range(count) for _ in maps]
        channels = list(maps) * count
        if seed == "strongest":
            seeds = Seeds.strongest(activations, rows, channels)
        elif seed == "all":
            seeds = Seeds.every_position(rows, channels, activations.device)
        elif isinstance(seed, str):
            raise UserError(f"unknown seed {seed!r}; choose strongest, all, or a row and column")
        else:
            seeds = Seeds.at(rows, channels, [seed] * len(rows), activations.device)
        return self.project(recording, layer, seeds).unflatten(0, (count, len(maps)))

    def _weight(self, name: str) -> Tensor:
        weight = self.net.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight

    def _walk(self, recording: Recording, layer: str, signal: transposed.Signal, rectify: bool) -> transposed.Signal:
        """From a layer's output to RGB; overwrites the signal it is given."""
        for name in reversed(self.layers[: self.layers.index(layer) + 1]):
            if name.startswith("relu"):
                if rectify:
                    F.relu_(signal.values)
            elif name.startswith("conv"):
                signal = transposed.convolution(signal, self._weight(name))
            elif name.startswith("pool"):
                signal = transposed.unpool(signal, recording.switches[name], recording.input_sizes[name])
            else:
                signal = transposed.matrix(signal, self._weight(name))
                if name == "fc6":
                    signal = transposed.averaging(signal, recording.input_sizes[name])
        pixels = signal.values.flip(1) if self.net.flavour == "caffe" else signal.values
        return replace(signal, values=pixels * self.net.gain)

    def _check_layer(self, layer: str) -> None:
        check_layer(layer)
        if layer not in self.layers:
            raise UserError(
                f"layer {layer} lies behind {self.layers[-1]}, where this VGG19 ends; load it up to {layer}"
            )

    def _recorded(self, recording: Recording, layer: str) -> Tensor:
        if layer not in recording.activations:
            raise UserError(f"{layer} is not recorded, only {', '.join(recording.activations)}; ask record() for it")
        return recording.activations[layer]

    def _check(self, recording: Recording, layer: str, seeds: Seeds) -> Tensor:
        """The layer's activations, on which all seeds lie; else UserError."""
        self._check_layer(layer)
        activations = self._recorded(recording, layer)
        count, channels = activations.shape[:2]
        check_maps(layer, seeds.maps.tolist(), channels)
        for image in seeds.images.tolist():
            if not 0 <= image < count:
                raise UserError(f"there is no image {image} in the recording; its images are 0 … {count - 1}")
        height, width = activations.shape[2:] if activations.ndim == 4 else (1, 1)
        for row, column in [] if seeds.positions is None else seeds.positions.tolist():
            if not (0 <= row < height and 0 <= column < width):
                raise UserError(
                    f"{layer} has no position ({row}, {column}) in this image; its rows are 0 … {height - 1}, its "
                    f"columns 0 … {width - 1}"
                )
        return activations
