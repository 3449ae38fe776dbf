"""One forward pass of the transform net, recorded for its deconvnet."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastnst.models.transform_net import ConvLayer, InputLayout, TransformNet, UpLayer
from fastnst_kernels.norm.upsample_pad import UpsamplePad, unpadded

IMAGE = "image"
"""Key of the input image in `passages`."""

_LayoutOf = Callable[[Tensor], InputLayout]
_Note = Callable[[str, ConvLayer | UpLayer, Tensor, InputLayout, Tensor], None]


class Passage(NamedTuple):
    """Forward state of a convolution, or of the input image, that its counterpart needs.

    Attributes:
        size: height and width of the result.
        written: the upsampling and padding with which the result was written for the next layer.
        rstd: 1 / √(σ² + ε) of the norm, `[N, C]`; None without a norm.
    """

    size: tuple[int, int]
    written: UpsamplePad
    rstd: Tensor | None = None

    @property
    def written_size(self) -> tuple[int, int]:
        return self.written.size(*self.size)


@dataclass(frozen=True)
class TransformRecording:
    """One forward pass, for any number of projections.

    Attributes:
        activations: recorded layer → `[N, C, H', W']`, channels_last, front to back.
        size: height and width of the images.
        passages: by layer, for a residual block its second convolution; `res1.conv1`, … are the first ones; `image` is
            the input after the network's own reflection padding.
    """

    activations: dict[str, Tensor]
    size: tuple[int, int]
    passages: dict[str, Passage]


@torch.no_grad()
def run_and_record(net: TransformNet, images: Tensor, layers: Sequence[str]) -> TransformRecording:
    """Run `net` once, in evaluation mode and in its parameters' type, without changing it.

    Args:
        net: the network.
        images: RGB in [0, 1], `[N, 3, H, W]` with sides of 16 pixels or more, on any device.
        layers: keep the activations of these.

    Raises:
        UserError: images of another shape.
    """
    device, dtype = net.conv1.weight.device, net.conv1.weight.dtype
    activations: dict[str, Tensor] = {}
    passages: dict[str, Passage] = {}

    def note(layer: str, module: ConvLayer | UpLayer, x: Tensor, layout: InputLayout, y: Tensor) -> None:
        written = UpsamplePad(*layout)
        passages[layer] = Passage((x.shape[2], x.shape[3]), written, _rstd(module, x))
        if layer in layers:
            activations[layer] = unpadded(y, written, x.shape[2:]).contiguous(memory_format=torch.channels_last)

    with torch.autocast(device.type, enabled=False), _in_evaluation_mode(net), _listening(net, note):
        net(images.to(device, dtype))
    size = (images.shape[2], images.shape[3])
    if "out" in activations:
        rows, columns = net.output_slices(passages["out"].size, size)
        activations["out"] = activations["out"][:, :, rows, columns].contiguous(memory_format=torch.channels_last)
    border = 2 * mirrored_before(net)
    # The first layer has no norm before it: `TransformNet.forward` itself writes its border.
    passages[IMAGE] = Passage((size[0] + border, size[1] + border), UpsamplePad(*net.conv1.input_layout(images)))
    return TransformRecording(activations, size, passages)


def mirrored_before(net: TransformNet) -> int:
    """Return the pixels of reflection padding that `net` adds at each side of an image."""
    return net.spec.border


def _rstd(module: ConvLayer | UpLayer, x: Tensor) -> Tensor | None:
    """Compute 1 / √(σ² + ε) `[N, C]` of the norm behind a convolution with result `x`."""
    if module.norm is None:
        return None
    if module.norm == "batch":
        return (module.running_var + module.eps).rsqrt().expand(x.shape[0], -1)
    # By means, because PyTorch's `var` is several times slower on channels_last.
    variance = (x - x.mean((2, 3), keepdim=True)).square().mean((2, 3))
    return (variance + module.eps).rsqrt()


@contextlib.contextmanager
def _in_evaluation_mode(net: TransformNet) -> Iterator[None]:
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _listening(net: TransformNet, note: _Note) -> Iterator[None]:
    """Call `note` after every convolution and norm, with the results of both.

    Between a convolution and its norm there is no module to hook, so each layer's `normalise` is wrapped.
    """
    layers = {
        name.removesuffix(".conv2"): module
        for name, module in net.named_modules()
        if isinstance(module, ConvLayer | UpLayer)
    }

    def listener(layer: str, module: ConvLayer | UpLayer) -> Callable[..., Tensor]:
        normalise = module.normalise

        def listening(x: Tensor, next_layout: _LayoutOf, residual: Tensor | None = None) -> Tensor:
            y = normalise(x, next_layout, residual)
            note(layer, module, x, next_layout(x), y)
            return y

        return listening

    try:
        for layer, module in layers.items():
            vars(module)["normalise"] = listener(layer, module)
        yield
    finally:
        for module in layers.values():
            vars(module).pop("normalise", None)
