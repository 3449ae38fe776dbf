"""Baselines: style transfer as the published example codes write it, with plain modules, plain loss and autograd.

The networks of all three architectures, VGG19 and the loss, with the formulas and parameters of `fastnst`, from
`torch.nn` alone, and well written: no bias before a norm, ReLUs in place, no needless pass, the content's features
without a graph, Gram matrices without a copy. Written apart from `fastnst`, which they check: they share no formula.

All pixels are in 0-255, as in the published codes.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnst.config import LossConfig
from fastnst.errors import UserError
from fastnst.losses.perceptual import UNIT_TO_255
from fastnst.models.vgg19 import BLOCKS

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class BaselineTransformNet(nn.Module):
    """The transform net with instance norm: `[N, 3, H, W]` → the same, both in 0-255.

    Args:
        architecture: `johnson`, `hwalsuklee` or `lengstrom`.
    """

    def __init__(self, architecture: str) -> None:
        super().__init__()
        self.architecture = architecture
        reflects = architecture == "johnson"
        self.conv1 = _conv(architecture, 3, 32, 9)
        self.conv2 = _conv(architecture, 32, 64, 3, 2)
        self.conv3 = _conv(architecture, 64, 128, 3, 2)
        for index in range(1, 6):
            self.add_module(f"res{index}", _Residual(architecture))
        self.up1 = (_NearestUp if reflects else _TransposedUp)(128, 64)
        self.up2 = (_NearestUp if reflects else _TransposedUp)(64, 32)
        self.out = _conv(architecture, 32, 3, 9, last=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.architecture == "hwalsuklee":
            x = F.pad(x / 255.0, (40,) * 4, mode="reflect")
        elif self.architecture == "lengstrom":
            x = x / 255.0
        for layer in self.children():
            x = layer(x)
        match self.architecture:
            case "hwalsuklee":
                return 127.5 * (x.float().tanh() + 1.0)
            case "lengstrom":
                return 150.0 * x.float().tanh() + 127.5
            case _:
                return x.float()

    def load_fastnst_state(self, state: dict[str, Tensor]) -> None:
        """Copy the weights of a `fastnst` transform net of the same architecture."""
        own = {common_name(name): tensor for name, tensor in self.state_dict().items()}
        assert own.keys() == state.keys(), own.keys() ^ state.keys()
        for name, tensor in own.items():
            tensor.copy_(state[name])


def common_name(name: str) -> str:
    """`res1.conv1.norm.weight` → `res1.conv1.scale`, the parameter's name in `fastnst`."""
    name = re.sub(r"\.conv\.(weight|bias)$", r".\1", name)
    return name.replace(".norm.weight", ".scale").replace(".norm.bias", ".shift")


def _norm(architecture: str, channels: int) -> nn.InstanceNorm2d:
    return nn.InstanceNorm2d(channels, eps=1e-5 if architecture == "johnson" else 1e-3, affine=True)


def _conv(
    architecture: str, inputs: int, outputs: int, kernel: int, stride: int = 1, *, last: bool = False
) -> nn.Sequential:
    """Padding, convolution, norm and ReLU, as far as the layer has them."""
    layer = nn.Sequential()
    around = 0
    if architecture == "johnson":
        layer.add_module("pad", nn.ReflectionPad2d(kernel // 2))
    elif stride > 1:
        layer.add_module("pad", nn.ZeroPad2d((0, 1, 0, 1)))  # TensorFlow's "SAME" for even sides
    else:
        around = kernel // 2
    has_norm = not last or architecture != "johnson"
    layer.add_module("conv", nn.Conv2d(inputs, outputs, kernel, stride, around, bias=not has_norm))
    if has_norm:
        layer.add_module("norm", _norm(architecture, outputs))
    if not last:
        layer.add_module("relu", nn.ReLU(inplace=True))
    return layer


class _Residual(nn.Module):
    def __init__(self, architecture: str) -> None:
        super().__init__()
        self.cuts = architecture == "hwalsuklee"
        for name, is_last in (("conv1", False), ("conv2", True)):
            layer = nn.Sequential()
            if architecture == "johnson":
                layer.add_module("pad", nn.ReflectionPad2d(1))
            around = 1 if architecture == "lengstrom" else 0
            layer.add_module("conv", nn.Conv2d(128, 128, 3, padding=around, bias=False))
            layer.add_module("norm", _norm(architecture, 128))
            if not is_last:
                layer.add_module("relu", nn.ReLU(inplace=True))
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x))
        return out + (x[:, :, 2:-2, 2:-2] if self.cuts else x)


class _NearestUp(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)
        self.conv = nn.Conv2d(inputs, outputs, 3, bias=False)
        self.norm = _norm("johnson", outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.relu_(self.norm(self.conv(self.pad(x))))


class _TransposedUp(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(inputs, outputs, 3, stride=2, bias=False)
        self.norm = _norm("hwalsuklee", outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.norm(self.conv(x)[:, :, :-1, :-1]))


class BaselineVGG19(nn.Module):
    """VGG19 with torchvision's normalisation, up to the deepest of `layers`, frozen.

    Args:
        layers: the ReLUs needed.

    Raises:
        UserError: a layer is no ReLU, and would be overwritten.
    """

    def __init__(self, layers: tuple[str, ...]) -> None:
        super().__init__()
        if others := [name for name in layers if not name.startswith("relu")]:
            raise UserError(f"the baselines' ReLUs work in place, so they cannot show {others[0]}; choose ReLUs")
        inputs, missing = 3, set(layers)
        for block, (channels, convolutions) in enumerate(BLOCKS, start=1):
            for index in range(1, convolutions + 1):
                if missing:
                    self.add_module(f"conv{block}_{index}", nn.Conv2d(inputs, channels, 3, padding=1))
                    self.add_module(f"relu{block}_{index}", nn.ReLU(inplace=True))
                missing.discard(f"relu{block}_{index}")
                inputs = channels
            if missing:
                self.add_module(f"pool{block}", nn.MaxPool2d(2))
        self.register_buffer("mean", 255.0 * torch.tensor(_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("gain", 1 / (255.0 * torch.tensor(_STD).reshape(3, 1, 1)), persistent=False)
        self.requires_grad_(False)

    def forward(self, pixels: Tensor, layers: tuple[str, ...]) -> dict[str, Tensor]:
        """Name → `[N, C, H', W']` of `layers`; nothing beyond the deepest of them is computed."""
        x = (pixels - self.mean) * self.gain
        x = x.to(self.conv1_1.weight.dtype)
        found: dict[str, Tensor] = {}
        for name, layer in self.named_children():
            x = layer(x)
            if name in layers:
                found[name] = x
                if len(found) == len(layers):
                    break
        return found


class BaselineLoss(nn.Module):
    """Content, style and total variation; `set_style` first.

    Args:
        vgg: as deep as `config` needs.
        config: layers, weights and reductions.
    """

    def __init__(self, vgg: BaselineVGG19, config: LossConfig) -> None:
        super().__init__()
        self.vgg, self.config = vgg, config
        self.layers = tuple(dict.fromkeys((*config.content_layers, *config.style_layers)))
        self.grams: dict[str, Tensor] = {}
        in_255 = config.feature_scale == "0-255"
        scale = UNIT_TO_255 if in_255 else 1.0
        weights = config.style_layer_weights or (1.0,) * len(config.style_layers)
        self.content_factor = config.content_weight * scale**2
        self.style_factors = {
            name: config.style_weight * weight * scale**4
            for name, weight in zip(config.style_layers, weights, strict=True)
        }
        self.tv_factor = config.tv_weight if in_255 else config.tv_weight / 255.0**2

    @torch.no_grad()
    def set_style(self, pixels: Tensor) -> None:
        """Compute the Grams of a style image `[1, 3, H, W]`."""
        for name, features in self.vgg(pixels, self.config.style_layers).items():
            gram = gram_matrix(features)
            self.grams[name] = gram if gram.dtype == torch.float64 else gram.float()

    def forward(self, stylized: Tensor, pixels: Tensor) -> Tensor:
        """The loss, 0-d."""
        features = self.vgg(stylized, self.layers)
        with torch.no_grad():
            targets = self.vgg(pixels, self.config.content_layers) if self.config.content_layers else {}
        loss = stylized.new_zeros(())
        for name, target in targets.items():
            loss = loss + self.content_factor * F.mse_loss(features[name], target)
        for name, factor in self.style_factors.items():
            gram = gram_matrix(features[name])
            term = F.mse_loss(gram, self.grams[name].expand_as(gram))
            loss = loss + factor * (term if self.config.style_reduction == "mean" else term * gram[0].numel())
        return loss + self.tv_factor * self._total_variation(stylized) if self.tv_factor else loss

    def _total_variation(self, stylized: Tensor) -> Tensor:
        reduction = self.config.tv_reduction
        vertical = F.mse_loss(stylized[:, :, 1:], stylized[:, :, :-1], reduction=reduction)
        horizontal = F.mse_loss(stylized[..., 1:], stylized[..., :-1], reduction=reduction)
        return (vertical + horizontal) / (stylized.shape[0] if reduction == "sum" else 1)


def gram_matrix(features: Tensor) -> Tensor:
    """`[N, C, H, W]` → `[N, C, C]`, divided by C·H·W; the product reads a view in either layout."""
    count = features[0].numel()
    if features.is_contiguous(memory_format=torch.channels_last):
        rows = features.permute(0, 2, 3, 1).flatten(1, 2)
        return torch.bmm(rows.transpose(1, 2), rows) / count
    rows = features.flatten(2)
    return torch.bmm(rows, rows.transpose(1, 2)) / count
