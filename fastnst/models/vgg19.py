"""VGG19 (Simonyan & Zisserman 2014, configuration E), the frozen loss network φ, with access to every layer."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnst.errors import UserError
from fastnst.models.vgg19_layers import BLOCKS, FLAVOURS, LAYERS, WEIGHT_SHAPES, check_layer, deepest_layer
from fastnst_kernels import max_pool2d_switches

__all__ = ["BLOCKS", "FLAVOURS", "LAYERS", "VGG19", "WEIGHT_SHAPES", "check_layer", "deepest_layer"]

# Preprocessing of RGB in [0, 1]: (x - mean) · gain.
_MEAN = {"torchvision": (0.485, 0.456, 0.406), "caffe": (123.68 / 255.0, 116.779 / 255.0, 103.939 / 255.0)}
_GAIN = {"torchvision": (1 / 0.229, 1 / 0.224, 1 / 0.225), "caffe": (255.0, 255.0, 255.0)}


class VGG19(nn.Module):
    """VGG19 up to `last_layer`, without the layers after it.

    Each layer is a module of its own name (`net.conv1_1`, `net.relu1_1`, …, `net.fc8`) that can be hooked or called.
    All parameters are frozen. A new network has He-initialised weights (He et al. 2015); `models.weights.load_vgg19`
    loads trained ones.

    Args:
        last_layer: the deepest layer.
        flavour: input format of the weights. `torchvision`: RGB in [0, 1] minus the mean, divided by the standard
            deviation of ImageNet's channels. `caffe`: BGR in 0-255 minus (103.939, 116.779, 123.68).
        generator: source of the initial weights; None: PyTorch's global one. A shallower network gets the same first
            layers from the same seed.

    Raises:
        UserError: unknown layer or flavour.
    """

    mean: Tensor
    gain: Tensor

    def __init__(
        self, last_layer: str = "pool5", flavour: str = "torchvision", *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_layer(last_layer)
        if flavour not in FLAVOURS:
            raise UserError(f"unknown VGG19 flavour {flavour!r}; choose one of {', '.join(FLAVOURS)}")
        self.last_layer = last_layer
        self.flavour = flavour
        self.layers = LAYERS[: LAYERS.index(last_layer) + 1]
        # Not persistent: they follow from the flavour.
        self.register_buffer("mean", torch.tensor(_MEAN[flavour]).reshape(3, 1, 1), persistent=False)
        self.register_buffer("gain", torch.tensor(_GAIN[flavour]).reshape(3, 1, 1), persistent=False)
        for name in self.layers:
            self.add_module(name, _layer(name, generator))
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval()

    def preprocess(self, x: Tensor) -> Tensor:
        """RGB in [0, 1], `[N, 3, H, W]`, to the input of conv1_1, channels_last."""
        x = (x.contiguous(memory_format=torch.channels_last) - self.mean) * self.gain
        return x.flip(1) if self.flavour == "caffe" else x

    def forward(self, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Compute the outputs of `layers`, and nothing beyond the deepest of them.

        A ReLU overwrites its convolution's output in place unless that is in `layers`, too.

        Args:
            x: `[N, 3, H, W]`, RGB in [0, 1].
            layers: names from `LAYERS`, at least one.

        Returns:
            name → `[N, C, H', W']` channels_last, or `[N, C]` from fc6 on, front to back.

        Raises:
            UserError: a layer is unknown or deeper than `last_layer`, or the image is too small for the deepest.
        """
        depth = self.check(x, layers)
        wanted = set(layers)
        outputs: dict[str, Tensor] = {}
        x = self.preprocess(x)
        for name in self.layers[: depth + 1]:
            layer = self.get_submodule(name)
            if isinstance(layer, ReLU):
                x = layer(x, inplace=not any(output is x for output in outputs.values()))
            else:
                x = layer(x)
            if name in wanted:
                outputs[name] = x
        return outputs

    def check(self, x: Tensor, layers: Sequence[str]) -> int:
        """Index of the deepest of `layers`; UserError, as in `forward`, if x cannot reach it."""
        if not layers:
            raise UserError("no VGG19 layer was given; name at least one")
        deepest = deepest_layer(layers)
        for name in layers:
            if name not in self.layers:
                raise UserError(
                    f"layer {name} lies behind {self.last_layer}, where this VGG19 ends; load it up to {name}"
                )
        if x.ndim != 4 or x.shape[1] != 3:
            raise UserError(f"VGG19 takes images [N, 3, H, W], got {list(x.shape)}")
        depth = LAYERS.index(deepest)
        smallest = 2 ** sum(name.startswith("pool") for name in LAYERS[: depth + 1])
        if min(x.shape[2:]) < smallest:
            raise UserError(
                f"an image of {x.shape[3]}×{x.shape[2]} pixels is too small for {deepest}, which needs "
                f"{smallest}×{smallest}; enlarge it or choose a shallower layer"
            )
        return depth


class ReLU(nn.Module):
    """max(x, 0)."""

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """`inplace` overwrites x."""
        return F.relu_(x) if inplace else F.relu(x)


class MaxPool(nn.Module):
    """2×2 windows at stride 2; an odd side loses its last row or column."""

    def forward(self, x: Tensor, switches: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """With `switches`, return those, too, as `max_pool2d_switches` does."""
        if switches:
            return max_pool2d_switches(x)
        # On a GPU the backward reads the switches, a byte each, instead of PyTorch's 64-bit indices.
        return max_pool2d_switches(x)[0] if x.is_cuda else F.max_pool2d(x, 2)


class FirstLinear(nn.Linear):
    """fc6: `[N, 512, H, W]`, averaged to 7×7, → `[N, 4096]`."""

    def forward(self, x: Tensor) -> Tensor:
        # torchvision flattens [C, 7, 7] in this order, whatever the memory layout.
        return super().forward(F.adaptive_avg_pool2d(x, 7).flatten(1))


def _layer(name: str, generator: torch.Generator | None) -> nn.Module:
    if name.startswith("relu"):
        return ReLU()
    if name.startswith("pool"):
        return MaxPool()
    # Without PyTorch's own initialisation, which would draw from the global generator.
    layer: nn.Conv2d | nn.Linear
    shape = WEIGHT_SHAPES[name]
    if name.startswith("conv"):
        layer = nn.utils.skip_init(nn.Conv2d, shape[1], shape[0], 3, padding=1)
    else:
        layer = nn.utils.skip_init(FirstLinear if name == "fc6" else nn.Linear, shape[1], shape[0])
    assert layer.bias is not None
    with torch.no_grad():
        layer.weight.normal_(0.0, math.sqrt(2.0 / math.prod(shape[1:])), generator=generator)
        layer.bias.zero_()
    return layer
