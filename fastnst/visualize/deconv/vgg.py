"""Deconvnet for VGG19: project activations to the pixels behind them (Zeiler & Fergus 2014, §2.1).

Legend: K neurons, that is pairs of an image and a feature map; [K, C, h, w] the signal reconstructed from them at a
layer with maps of h×w.

Each layer has its counterpart, applied from the neurons' layer down to the pixels, all other activations being zero:

    convolution      the transposed filter, without bias
    ReLU             ReLU of the signal itself
    max pooling      unpooling with the switches of the forward pass
    fully connected  the transposed matrix; of fc6 also the adjoint of its averaging to 7×7
    preprocessing    the adjoint of its linear part: the channels' gain and order

So a projection is an input gradient, but for the ReLUs: there the gradient stops where the forward pass was negative,
the deconvnet where the signal is. Without them (`rectify=False`) it is the exact adjoint of the net's linear part.

A neuron with a position reaches only its receptive field. Its signal is therefore kept as a window, which grows from
1×1 by 2 with each convolution and twofold with each pooling, while that is smaller than the map. After each layer the
part of a window outside the map is cleared, so that borders are exact, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst.errors import UserError
from fastnst.models.vgg19 import VGG19, check_layer
from fastnst.visualize.deconv import transposed, windows
from fastnst.visualize.deconv.neurons import Activation, Neurons, check_images, check_maps, recorded
from fastnst.visualize.deconv.receptive_field import receptive_field


@dataclass(frozen=True)
class Recording:
    """One forward pass, for any number of projections.

    Attributes:
        activations: outputs of the recorded layers, `[N, C, h, w]` channels_last, or `[N, C]` from fc6 on.
        size: height and width of the images.
        switches: of each pool below the deepest recorded layer, `[N, C, h, w]` uint8.
        input_sizes: height and width of the input of each of these pools, and of fc6.
    """

    activations: dict[str, Tensor]
    size: tuple[int, int]
    switches: dict[str, Tensor]
    input_sizes: dict[str, tuple[int, int]]


class Deconvnet:
    """Projects activations of a VGG19 back to pixels, without changing the net.

    Args:
        net: in any floating-point type, on any device; projections are in that type and on that device.
    """

    def __init__(self, net: VGG19) -> None:
        self.net = net
        self.layers: tuple[str, ...] = net.layers

    def channels(self, layer: str) -> int:
        """Return the number of feature maps of a layer; raise UserError if the net does not have it."""
        self._check_layer(layer)
        below = [name for name in self.layers[: self.layers.index(layer) + 1] if name.startswith(("conv", "fc"))]
        return self._weight(below[-1]).shape[0]

    @torch.no_grad()
    def record(self, images: Tensor, layers: Sequence[str]) -> Recording:
        """Run one forward pass.

        Args:
            images: `[N, 3, H, W]`, RGB in [0, 1].
            layers: keep the activations of these, at least one.

        Raises:
            UserError: a layer is unknown or behind the net's last, or the images are not dense tensors of floats or too
                small for the deepest.
        """
        check_images(images)
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
        self, recording: Recording, layer: str, neurons: Neurons, *, batch_size: int = 16, rectify: bool = True
    ) -> Tensor:
        """Project each neuron by itself to pixels.

        Args:
            recording: holds `layer`.
            layer: of the neurons.
            neurons: K of them.
            batch_size: whole images' worth of signal at a time; of small windows, more fit in.
            rectify: apply the ReLUs.

        Returns:
            `[K, 3, H, W]`, signed, in units of activation.

        Raises:
            UserError: `layer` is unknown or not recorded; or an image, map or position is out of range.
        """
        activations = self._check(recording, layer, neurons)
        neurons = neurons.to(activations.device)
        height, width = recording.size
        if neurons.positions is not None and activations.ndim == 4:
            batch_size *= max(1, height * width // receptive_field(layer).size ** 2)
        projections = activations.new_zeros((len(neurons), 3, height, width))
        for start in range(0, len(neurons), batch_size):
            part = slice(start, start + batch_size)
            signal = self._to_pixels(recording, layer, transposed.start(activations, neurons[part]), rectify)
            if signal.corners is None:
                projections[part] = signal.values
            else:
                windows.put_back(signal.values, signal.corners, projections[part])
        return projections

    @torch.no_grad()
    def project_patches(
        self, recording: Recording, layer: str, neurons: Neurons, *, batch_size: int = 256, rectify: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Project like `project`, cropped to each neuron's receptive field; outside it a projection is zero.

        Args:
            recording: holds `layer`.
            layer: up to pool5.
            neurons: K of them, with positions.
            batch_size: neurons at a time.
            rectify: apply the ReLUs.

        Returns:
            patches: `[K, 3, s, s]`, s being the size of the layer's receptive field; 0 outside the image.
            corners: `[K, 2]` int64, row and column of the image where each begins; may be negative.

        Raises:
            UserError: as in `project`; the neurons have no positions; or `layer` is fully connected.
        """
        activations = self._check(recording, layer, neurons)
        field = receptive_field(layer)
        if neurons.positions is None:
            raise UserError("patches need a position each, and these neurons have none; use Neurons.at or .strongest")
        neurons = neurons.to(activations.device)
        assert neurons.positions is not None
        corners = neurons.positions * field.jump + field.start
        cropped = activations.new_zeros((len(neurons), 3, field.size, field.size))
        for start in range(0, len(neurons), batch_size):
            part = slice(start, start + batch_size)
            signal = self._to_pixels(recording, layer, transposed.start(activations, neurons[part]), rectify)
            whole = signal.corners is None
            cropped[part] = windows.cut(signal.values, corners[part], field.size) if whole else signal.values
        return cropped, corners

    @torch.no_grad()
    def project_layer(self, recording: Recording, layer: str, *, batch_size: int = 16, rectify: bool = True) -> Tensor:
        """Project all activations of a layer together, image by image, to `[N, 3, H, W]`; else as `project`."""
        self._check_layer(layer)
        activations = recorded(recording.activations, layer)
        count = activations.shape[0]
        projections = activations.new_zeros((count, 3, *recording.size))
        for start in range(0, count, batch_size):
            signal = transposed.start_layer(activations, start, min(start + batch_size, count))
            projections[start : start + batch_size] = self._to_pixels(recording, layer, signal, rectify).values
        return projections

    def __call__(
        self, images: Tensor, layer: str, maps: Sequence[int], *, activation: Activation = "strongest"
    ) -> Tensor:
        """Project some maps of a layer, for each of the images, by one forward pass.

        Args:
            images: `[N, 3, H, W]`, RGB in [0, 1].
            layer: to project from.
            maps: M channels of it.
            activation: `strongest`, `all` activations of the map, or the row and column of one.

        Returns:
            `[N, M, 3, H, W]`.

        Raises:
            UserError: unknown layer, map, activation or position, or the images are too small for the layer.
        """
        check_maps(layer, maps, self.channels(layer))
        recording = self.record(images, [layer])
        rows = [row for row in range(len(images)) for _ in maps]
        neurons = Neurons.select(recording.activations[layer], rows, list(maps) * len(images), activation)
        projections: Tensor = self.project(recording, layer, neurons).unflatten(0, (len(images), len(maps)))
        return projections

    def _weight(self, name: str) -> Tensor:
        weight = self.net.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight

    def _to_pixels(
        self, recording: Recording, layer: str, signal: transposed.Signal, rectify: bool
    ) -> transposed.Signal:
        """Reconstruct RGB from a signal at a layer's output; overwrites `signal`."""
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

    def _check(self, recording: Recording, layer: str, neurons: Neurons) -> Tensor:
        """Return the layer's activations, or raise UserError where a neuron lies outside them."""
        self._check_layer(layer)
        activations = recorded(recording.activations, layer)
        neurons.check(layer, activations)
        return activations
