"""The deconvnet of the transform net: from any of its layers back to pixels.

Zeiler & Fergus 2014, §2.1, run a network backwards: the signal is rectified and sent through the transposed filters,
without biases, layer by layer, until it is an image. Every layer has its adjoint as the counterpart:

| on the way up | on the way down |
|---|---|
| convolution, strided or not; transposed convolution | the transposed filters; the convolution |
| norm: (x − μ)·scale / √(σ² + ε) + shift | · scale / √(σ² + ε), with the σ² of the way up |
| ReLU | ReLU, on the signal |
| border: zeros; reflected, once or repeatedly | left out; added where it came from |
| enlargement ×2, nearest neighbour | the sum over 2×2 |
| residual block: x + branch(x) | signal + what the branch's counterpart makes of it |
| cropping | zeros around |
| ×255 (johnson) | ×255 |

Layers are `conv1`, `conv2`, `conv3`, `res1` … `res5`, `up1`, `up2`, `out`. A layer's activations are what it hands on:
after norm, addition and ReLU, without the border that the next layer asked for. Those of `out` come before tanh and
scaling, cropped to the image. Residual blocks and `out` end without a ReLU, so their signal keeps its sign.

Rectified at every layer, all signals converge to one pattern (Sixt, Granz, Landgraf 2020, "When Explanations Lie"):
from `res3` on, all of a published network arrives as a soft blob at its strongest place. `renormalise` does
against that what the norms do on the way up: for a signal g the norm's counterpart is (g − mean g)·scale / deviation of
g, per seed and map. That is no adjoint any more, but it keeps shapes and strokes apart down from the last layer: the
strip from photo to painting is made with it. A single position it surrounds with what the subtracted mean makes of the
borders.
"""

import difflib
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst.errors import UserError
from fastnst.models.transform_net import ConvLayer, ResidualBlock, TransformNet, UpLayer
from fastnst.visualize.deconv.adjoints import (
    conv2d_adjoint,
    crop_adjoint,
    doubling_conv_transpose2d_adjoint,
    reflect_pad_adjoint,
)
from fastnst.visualize.deconv.neurons import Seeds, check_maps
from fastnst.visualize.deconv.transform_recording import (
    IMAGE,
    Passage,
    TransformRecording,
    mirrored_before,
    run_and_record,
)
from fastnst_kernels.placement import Placement, border_around, place_adjoint

# What a nearest-neighbour layer's input amounts to, whichever way the device takes from it.
_ENLARGED = Placement(2, (1, 1, 1, 1), "reflect")


class TransformDeconvnet:
    """Projects what the layers of a transform net respond to back to pixels (Zeiler & Fergus 2014, §2.1).

    The network works as when it paints: in evaluation mode and in its parameters' type, batch norm with the running
    statistics, instance norm with the image's own. It is left as it was. Its weights are not part of a recording:
    project before they change.

    Args:
        net: the network, on the device where it is to work.

    Attributes:
        layers: the layers that can be asked for, front to back.
    """

    def __init__(self, net: TransformNet) -> None:
        self.net = net
        self.layers: tuple[str, ...] = net.layer_names

    def record(self, images: Tensor, layers: Sequence[str]) -> TransformRecording:
        """Run the network once and keep the layers' activations, and what projecting them needs.

        Args:
            images: RGB in [0, 1], `[N, 3, H, W]` with sides of 16 pixels or more, on any device.
            layers: names out of `self.layers`, at least one.

        Raises:
            UserError: an unknown layer or none, images of another shape, or whole numbers instead of floats.
        """
        if not layers:
            raise UserError(f"no layer is asked for; name at least one of {', '.join(self.layers)}")
        for layer in layers:
            self._check_layer(layer)
        if not images.is_floating_point():
            raise UserError(f"images are floats in [0, 1], got {images.dtype}; divide by 255 first")
        return run_and_record(self.net, images, layers)

    def project(
        self,
        recording: TransformRecording,
        layer: str,
        seeds: Seeds,
        *,
        batch_size: int = 16,
        rectify: bool = True,
        renormalise: bool = False,
    ) -> Tensor:
        """Send single activations, or single feature maps, back to pixels, each for itself.

        Args:
            recording: of this network.
            layer: one of the recorded layers.
            seeds: K pairs of an image and a map, each with a position or with the whole map. They start with the
                activations' own values, all others are zero.
            batch_size: how many go down at once.
            rectify: apply the ReLUs to the signal. Without them the projection is the exact adjoint of the network in
                which ReLUs let everything pass and the norms' statistics are constants.
            renormalise: give each norm the signal's own statistics: see above.

        Returns:
            `[K, 3, H, W]`, signed, in the order of the seeds.

        Raises:
            UserError: the layer was not recorded, or an image, map or position is out of range.
        """
        activations = self._recorded(recording, layer)
        _check_seeds(layer, seeds, activations)
        seeds = seeds.to(activations.device)
        parts = [
            self._to_pixels(recording, layer, _plant(activations, part), part.images, rectify, renormalise)
            for part in (seeds[first : first + batch_size] for first in range(0, len(seeds), batch_size))
        ]
        return torch.cat(parts) if parts else activations.new_zeros(0, 3, *recording.size)

    def project_layer(
        self,
        recording: TransformRecording,
        layer: str,
        *,
        batch_size: int = 16,
        rectify: bool = True,
        renormalise: bool = False,
    ) -> Tensor:
        """Send all of a layer's activations, all maps and positions at once, back to pixels.

        Args:
            recording: of this network.
            layer: one of the recorded layers.
            batch_size: how many images go down at once.
            rectify: see `project`.
            renormalise: give each norm the signal's own statistics: see above.

        Returns:
            `[N, 3, H, W]`, signed, one per image.

        Raises:
            UserError: the layer was not recorded.
        """
        activations = self._recorded(recording, layer)
        images = torch.arange(activations.shape[0], device=activations.device)
        parts = zip(activations.split(batch_size), images.split(batch_size), strict=True)
        return torch.cat(
            [self._to_pixels(recording, layer, signal, whose, rectify, renormalise) for signal, whose in parts]
        )

    def _check_layer(self, layer: str) -> None:
        if layer not in self.layers:
            near = difflib.get_close_matches(layer, self.layers, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the layers are {', '.join(self.layers)}"
            raise UserError(f"the transform net has no layer {layer!r}; {hint}")

    def _recorded(self, recording: TransformRecording, layer: str) -> Tensor:
        self._check_layer(layer)
        if layer not in recording.activations:
            raise UserError(
                f"layer {layer} was not recorded, only {', '.join(recording.activations)}; ask for it in `record`"
            )
        return recording.activations[layer]

    @torch.no_grad()
    def _to_pixels(
        self,
        recording: TransformRecording,
        layer: str,
        signal: Tensor,
        images: Tensor,
        rectify: bool,
        renormalise: bool,
    ) -> Tensor:
        """`signal` `[K, C, H', W']` at a layer's activations → `[K, 3, H, W]`; `images`: whose statistics hold."""
        passages = recording.passages

        def through(name: str, module: ConvLayer | UpLayer, signal: Tensor, before: Passage) -> Tensor:
            """From a convolution's result, normed and rectified, to what it saw, without its border."""
            if module.relu and rectify:
                signal = signal.relu()
            rstd = passages[name].rstd
            if rstd is not None and renormalise:
                signal = _standardised(signal) * module.scale[:, None, None]
            elif rstd is not None:
                signal = signal * (module.scale * rstd[images])[:, :, None, None]
            if isinstance(module, UpLayer) and module.nearest:
                before = before._replace(placing=_ENLARGED)
            return place_adjoint(_convolution_adjoint(module, signal, before.placed_size), before.placing)

        if layer == "out":
            size = passages[layer].size
            signal = crop_adjoint(signal, size, self.net.output_slices(size, recording.size))
        way = pairwise((IMAGE, *self.layers[: self.layers.index(layer) + 1]))
        for preceding, name in reversed(list(way)):
            before = passages[preceding]
            module = self.net.get_submodule(name)
            if isinstance(module, ResidualBlock):
                branch = through(name, module.conv2, signal, passages[f"{name}.conv1"])
                branch = through(f"{name}.conv1", module.conv1, branch, before)
                signal = branch + F.pad(signal, (border_around(branch, signal),) * 4)
            else:
                assert isinstance(module, ConvLayer | UpLayer)
                signal = through(name, module, signal, before)
        signal = reflect_pad_adjoint(signal, mirrored_before(self.net))
        return signal * self.net.spec.input_scale


def _convolution_adjoint(module: ConvLayer | UpLayer, signal: Tensor, size: tuple[int, int]) -> Tensor:
    """From a convolution's result to what it ran on, which has height and width `size`."""
    if isinstance(module, UpLayer):
        if module.nearest:
            return conv2d_adjoint(signal, module.weight, size)
        return doubling_conv_transpose2d_adjoint(signal, module.weight)
    around = module.weight.shape[-1] // 2 if module.padding == "same" and module.stride == 1 else 0
    return conv2d_adjoint(signal, module.weight, size, stride=module.stride, padding=around)


def _standardised(signal: Tensor) -> Tensor:
    """Mean 0 and deviation 1 for each map that is not flat."""
    # By means, because PyTorch's `std` is several times slower on channels_last.
    mean = signal.mean((2, 3), keepdim=True)
    centred = signal - mean
    deviation = centred.square().mean((2, 3), keepdim=True).sqrt()
    # What rounding leaves of a flat map must not be blown up.
    precision = torch.finfo(signal.dtype)
    return centred / torch.maximum(deviation, precision.eps**0.5 * mean.abs()).clamp_min(precision.tiny)


def _check_seeds(layer: str, seeds: Seeds, activations: Tensor) -> None:
    count, channels, height, width = activations.shape
    check_maps(layer, seeds.maps.tolist(), channels)
    if wrong := [row for row in seeds.images.tolist() if not 0 <= row < count]:
        raise UserError(f"the recording has no image {wrong[0]}; its images are 0 … {count - 1}")
    if seeds.positions is None:
        return
    for row, column in seeds.positions.tolist():
        if not (0 <= row < height and 0 <= column < width):
            raise UserError(
                f"{layer} has no position ({row}, {column}); its rows are 0 … {height - 1}, its columns 0 … {width - 1}"
            )


def _plant(activations: Tensor, seeds: Seeds) -> Tensor:
    """`[K, C, H', W']`: each seed's activations in their places, zeros elsewhere."""
    one = torch.arange(len(seeds), device=activations.device)
    signal = activations.new_zeros(len(seeds), *activations.shape[1:]).contiguous(memory_format=torch.channels_last)
    if seeds.positions is None:
        signal[one, seeds.maps] = activations[seeds.images, seeds.maps]
    else:
        rows, columns = seeds.positions.unbind(1)
        signal[one, seeds.maps, rows, columns] = activations[seeds.images, seeds.maps, rows, columns]
    return signal
