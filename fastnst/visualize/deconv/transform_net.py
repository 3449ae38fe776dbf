"""Deconvnet for the transform net: project any of its layers back to pixels.

Zeiler & Fergus 2014, §2.1, run a network backwards: the signal is rectified and sent through the transposed filters,
without biases, layer by layer, until it is an image. The counterpart of each layer is its adjoint:

| forward | backward |
|---|---|
| convolution, strided or not; transposed convolution | the transposed filters; the convolution |
| norm: (x − μ)·scale / √(σ² + ε) + shift | · scale / √(σ² + ε), with the σ² of the forward pass |
| ReLU | ReLU, on the signal |
| padding: zeros; reflected, once or repeatedly | cropped; added where it came from |
| upsampling ×2, nearest neighbour | the sum over 2×2 |
| residual block: x + branch(x) | signal + the branch's counterpart of it |
| cropping | zeros around |
| ×255 (johnson) | ×255 |

Layers are `conv1`, `conv2`, `conv3`, `res1` … `res5`, `up1`, `up2`, `out`. A layer's activations are its output after
norm, addition and ReLU, without the next layer's padding. Those of `out` come before tanh and scaling, cropped to the
image. Residual blocks and `out` end without a ReLU, so their signal keeps its sign.

Rectified at every layer, all signals converge to one pattern (Sixt, Granz, Landgraf 2020, "When Explanations Lie"):
from `res3` on, projections of a published network end as a soft blob at the strongest place. `renormalise` counters
that as norms do in the forward pass: for a signal g the norm's counterpart is (g − mean g)·scale / deviation of g, per
neuron and map. This is no adjoint any more, but keeps shapes and strokes apart down from the last layer; the strips
from photo to output use it. Around a single position it leaves artefacts of the subtracted mean at the borders.
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
from fastnst.visualize.deconv.neurons import Neurons, check_images, recorded
from fastnst.visualize.deconv.transform_recording import (
    IMAGE,
    Passage,
    TransformRecording,
    mirrored_before,
    run_and_record,
)
from fastnst_kernels.norm.upsample_pad import UpsamplePad, margin, upsample_pad_adjoint

# What a nearest-neighbour layer's input amounts to, whichever way the device takes from it.
_ENLARGED = UpsamplePad(2, (1, 1, 1, 1), "reflect")


class TransformDeconvnet:
    """Projects activations of a transform net back to pixels (Zeiler & Fergus 2014, §2.1).

    The network runs in evaluation mode and in its parameters' type: batch norm with the running statistics, instance
    norm with the image's own. It is not changed. A recording does not hold its weights: project before they change.

    Args:
        net: the network, on the device to use.

    Attributes:
        layers: names of the layers, front to back.
    """

    def __init__(self, net: TransformNet) -> None:
        self.net = net
        self.layers: tuple[str, ...] = net.layer_names

    def channels(self, layer: str) -> int:
        """Return the number of feature maps of a layer; UserError if it is unknown."""
        self._check_layer(layer)
        module = self.net.get_submodule(layer)
        module = module.conv2 if isinstance(module, ResidualBlock) else module
        assert isinstance(module, ConvLayer | UpLayer)
        offset = module.bias if module.norm is None else module.shift
        assert offset is not None
        return offset.shape[0]

    def record(self, images: Tensor, layers: Sequence[str]) -> TransformRecording:
        """Run the network once; keep the layers' activations and the state that projecting them needs.

        Args:
            images: RGB in [0, 1], `[N, 3, H, W]` with sides of 16 pixels or more, on any device.
            layers: names out of `self.layers`, at least one.

        Raises:
            UserError: an unknown layer or none, images of another shape, or whole numbers instead of floats.
        """
        if not layers:
            raise UserError(f"no layer was given; name at least one of {', '.join(self.layers)}")
        for layer in layers:
            self._check_layer(layer)
        check_images(images)
        return run_and_record(self.net, images, layers)

    def project(
        self,
        recording: TransformRecording,
        layer: str,
        neurons: Neurons,
        *,
        batch_size: int = 16,
        rectify: bool = True,
        renormalise: bool = False,
    ) -> Tensor:
        """Project each neuron, or each whole feature map, by itself to pixels.

        Args:
            recording: of this network.
            layer: one of the recorded layers.
            neurons: K pairs of an image and a map, each with a position or with the whole map.
            batch_size: neurons at a time.
            rectify: apply the ReLUs to the signal. Without them the projection is the exact adjoint of the network
                whose ReLUs are identities and whose norms have constant statistics.
            renormalise: normalise by the signal's own statistics in each norm: see above.

        Returns:
            `[K, 3, H, W]`, signed, in the order of the neurons.

        Raises:
            UserError: the layer was not recorded, or an image, map or position is out of range.
        """
        activations = self._recorded(recording, layer)
        neurons.check(layer, activations)
        neurons = neurons.to(activations.device)
        parts = [
            self._to_pixels(recording, layer, _start(activations, part), part.images, rectify, renormalise)
            for part in (neurons[first : first + batch_size] for first in range(0, len(neurons), batch_size))
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
        """Project all activations of a layer together, image by image, to `[N, 3, H, W]`; else as `project`."""
        activations = self._recorded(recording, layer)
        images = torch.arange(activations.shape[0], device=activations.device)
        parts = zip(activations.split(batch_size), images.split(batch_size), strict=True)
        return torch.cat(
            [self._to_pixels(recording, layer, signal, rows, rectify, renormalise) for signal, rows in parts]
        )

    def _check_layer(self, layer: str) -> None:
        if layer not in self.layers:
            near = difflib.get_close_matches(layer, self.layers, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the layers are {', '.join(self.layers)}"
            raise UserError(f"the transform net has no layer {layer!r}; {hint}")

    def _recorded(self, recording: TransformRecording, layer: str) -> Tensor:
        self._check_layer(layer)
        return recorded(recording.activations, layer)

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
        """Project `signal` `[K, C, H', W']` of `images` `[K]` at a layer to `[K, 3, H, W]`."""
        passages = recording.passages

        def through(name: str, module: ConvLayer | UpLayer, signal: Tensor, before: Passage) -> Tensor:
            """From the output of a convolution with norm and ReLU to its input, without padding."""
            if module.relu and rectify:
                signal = signal.relu()
            rstd = passages[name].rstd
            if rstd is not None and renormalise:
                signal = _standardised(signal) * module.scale[:, None, None]
            elif rstd is not None:
                signal = signal * (module.scale * rstd[images])[:, :, None, None]
            if isinstance(module, UpLayer) and module.nearest:
                before = before._replace(written=_ENLARGED)
            return upsample_pad_adjoint(_convolution_adjoint(module, signal, before.written_size), before.written)

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
                signal = branch + F.pad(signal, (margin(branch, signal),) * 4)
            else:
                assert isinstance(module, ConvLayer | UpLayer)
                signal = through(name, module, signal, before)
        signal = reflect_pad_adjoint(signal, mirrored_before(self.net))
        return signal * self.net.spec.input_scale


def _convolution_adjoint(module: ConvLayer | UpLayer, signal: Tensor, size: tuple[int, int]) -> Tensor:
    """From a convolution's output to its input of height and width `size`."""
    if isinstance(module, UpLayer):
        if module.nearest:
            return conv2d_adjoint(signal, module.weight, size)
        return doubling_conv_transpose2d_adjoint(signal, module.weight)
    around = module.weight.shape[-1] // 2 if module.padding == "same" and module.stride == 1 else 0
    return conv2d_adjoint(signal, module.weight, size, stride=module.stride, padding=around)


def _standardised(signal: Tensor) -> Tensor:
    """Scale each map that is not constant to mean 0 and deviation 1."""
    # By means, because PyTorch's `std` is several times slower on channels_last.
    mean = signal.mean((2, 3), keepdim=True)
    centred = signal - mean
    deviation = centred.square().mean((2, 3), keepdim=True).sqrt()
    # Rounding errors of a constant map must not be amplified.
    precision = torch.finfo(signal.dtype)
    return centred / torch.maximum(deviation, precision.eps**0.5 * mean.abs()).clamp_min(precision.tiny)


def _start(activations: Tensor, neurons: Neurons) -> Tensor:
    """Place each neuron's activation in `[K, C, H', W']` of zeros."""
    one = torch.arange(len(neurons), device=activations.device)
    signal = activations.new_zeros(len(neurons), *activations.shape[1:]).contiguous(memory_format=torch.channels_last)
    if neurons.positions is None:
        signal[one, neurons.maps] = activations[neurons.images, neurons.maps]
    else:
        rows, columns = neurons.positions.unbind(1)
        signal[one, neurons.maps, rows, columns] = activations[neurons.images, neurons.maps, rows, columns]
    return signal
