"""The perceptual loss (Johnson, Alahi, Fei-Fei 2016, equations 1 to 4) and total variation.

For a stylised picture ŷ, its content x and the style picture s, φ_j a layer of VGG19 with C·H·W outputs:

    content  ‖φ_j(ŷ) − φ_j(x)‖² / (C·H·W)                        eq. 2
    Gram     G_j = φ_jᵀ φ_j / (C·H·W)                            eq. 3
    style    ‖G_j(ŷ) − G_j(s)‖²_F, or its mean over the C² entries  eq. 4
    tv       the squared differences of neighbouring pixels

Each is averaged over the batch, weighted, and summed over its layers.

Scale. Weights are tuned to the size of the features, and that differs: Caffe's VGG is fed with 0-255 pixels,
torchvision's with pixels divided by their standard deviation σ, in [0, 1] scale about 0.226, so that its input is
smaller by s = 255·σ ≈ 57.6. Convolution, ReLU and pooling are positively homogeneous if the biases grow with the input:
fed with s·x and given s·biases, φ yields s·φ(x). Hence s·φ is torchvision's net re-expressed for 0-255 pixels, and a
content weight tuned there applies to (s·Δφ)² = s²·(Δφ)². The Gram is quadratic in φ and the style term quadratic in
the Gram: s⁴. The other way around, Caffe's features under weights tuned in the unit scale, both factors divide.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnst.config import LossConfig
from fastnst.errors import UserError
from fastnst.models.vgg19 import VGG19
from fastnst_kernels import gram_matrix, style_loss

UNIT_TO_255 = 255.0 * (0.229 + 0.224 + 0.225) / 3.0
"""s: how much larger Caffe's 0-255 input is than torchvision's normalised one, ≈ 57.6."""


@dataclass(frozen=True)
class LossTerms:
    """The loss of one batch and what it is made of: weighted 0-d tensors, fp32 or the pictures' wider type."""

    total: Tensor
    """content + style + tv"""
    content: Tensor
    style: Tensor
    tv: Tensor
    layers: dict[str, Tensor]
    """`content/relu4_2`, `style/relu1_1`, …: the summands of content and style."""

    def detach(self) -> "LossTerms":
        """The same numbers without their graph."""
        layers = {name: term.detach() for name, term in self.layers.items()}
        return LossTerms(self.total.detach(), self.content.detach(), self.style.detach(), self.tv.detach(), layers)


class PerceptualLoss(nn.Module):
    """What a stylised batch costs; `set_style` first.

    Runs under autocast: the matrix work of φ in its type, Grams, sums and losses in fp32.

    Args:
        vgg: the frozen loss network, at least as deep as the deepest layer of `config`.
        config: layers, weights, reductions and the scale they were tuned in.

    Raises:
        UserError: `vgg` ends before a layer of `config`.
    """

    def __init__(self, vgg: VGG19, config: LossConfig) -> None:
        super().__init__()
        for layer in (*config.content_layers, *config.style_layers):
            if layer not in vgg.layers:
                raise UserError(
                    f"the loss needs layer {layer}, but the loaded VGG19 ends at {vgg.last_layer}; "
                    "choose other loss layers or deeper weights"
                )
        self.vgg = vgg
        self.config = config
        own_scale = "0-255" if vgg.flavour == "caffe" else "unit"
        to_255 = UNIT_TO_255 if own_scale == "unit" else 1.0 / UNIT_TO_255
        scale = 1.0 if config.feature_scale == own_scale else to_255
        self._content_factor = config.content_weight * scale**2
        per_layer = config.style_layer_weights or (1.0,) * len(config.style_layers)
        self._style_factors = {
            layer: config.style_weight * weight * scale**4
            for layer, weight in zip(config.style_layers, per_layer, strict=True)
        }
        pixel_scale = 255.0 if config.feature_scale == "0-255" else 1.0
        self._tv_factor = config.tv_weight * pixel_scale**2

    @torch.no_grad()
    def set_style(self, style: Tensor) -> None:
        """Take the style picture's Grams, in fp32 whatever autocast says; they stay as buffers `gram_<layer>`.

        Args:
            style: `[1, 3, H, W]`, RGB in [0, 1], any size that reaches the deepest style layer.

        Raises:
            UserError: another shape, or too small a picture.
        """
        if style.ndim != 4 or style.shape[:2] != (1, 3):
            raise UserError(f"the style is one picture [1, 3, H, W], got {list(style.shape)}")
        if not self._style_factors:
            return
        with torch.autocast(style.device.type, enabled=False):
            features = self.vgg(_at_least_fp32(style), tuple(self._style_factors))
            for layer, activation in features.items():
                # Not persistent: they follow from the style picture, which a run takes anew whenever it starts.
                self.register_buffer(f"gram_{layer}", gram_matrix(activation)[0], persistent=False)

    def forward(self, stylized: Tensor, content: Tensor) -> LossTerms:
        """The loss of a batch; differentiable with respect to `stylized`.

        φ sees `stylized` once, up to the deepest layer in use, and `content`, without gradient, only as far as the
        content layers go.

        Args:
            stylized: `[N, 3, H, W]`, RGB in [0, 1].
            content: the same shape.

        Raises:
            ValueError: the shapes differ, or `set_style` was not called.
            UserError: the pictures are too small for a layer.
        """
        if stylized.shape != content.shape:
            raise ValueError(
                f"stylized {list(stylized.shape)} and content {list(content.shape)} differ in shape; "
                "give the pictures that were stylised"
            )
        if any(not hasattr(self, f"gram_{layer}") for layer in self._style_factors):
            raise ValueError("the loss has no style yet; call set_style with the style picture first")
        content_layers = self.config.content_layers
        features = self.vgg(stylized, tuple(dict.fromkeys((*content_layers, *self._style_factors))))
        with torch.no_grad():
            targets = self.vgg(content, content_layers) if content_layers else {}
        # On a CPU autocast would take squared errors, too, in its low precision.
        with torch.autocast(stylized.device.type, enabled=False):
            return self._terms(stylized, features, targets)

    def _terms(self, stylized: Tensor, features: dict[str, Tensor], targets: dict[str, Tensor]) -> LossTerms:
        zero = torch.zeros((), dtype=_at_least_fp32(stylized).dtype, device=stylized.device)
        layers: dict[str, Tensor] = {}
        for layer in self.config.content_layers:
            difference = F.mse_loss(_at_least_fp32(features[layer]), _at_least_fp32(targets[layer]))
            layers[f"content/{layer}"] = self._content_factor * difference
        for layer, factor in self._style_factors.items():
            layers[f"style/{layer}"] = factor * self._style_term(features[layer], layer)
        content_term = sum((term for name, term in layers.items() if name.startswith("content/")), zero)
        style_term = sum((term for name, term in layers.items() if name.startswith("style/")), zero)
        tv_term = self._tv_factor * total_variation(stylized, self.config.tv_reduction) if self._tv_factor else zero
        return LossTerms(content_term + style_term + tv_term, content_term, style_term, tv_term, layers)

    def _style_term(self, activation: Tensor, layer: str) -> Tensor:
        target: Tensor = self.get_buffer(f"gram_{layer}")
        term = style_loss(activation, target).mean()
        return term / target.numel() if self.config.style_reduction == "mean" else term


def total_variation(pictures: Tensor, reduction: str = "mean") -> Tensor:
    """Squared differences of neighbouring pixels of `[N, 3, H, W]`, 0-d, fp32 or wider.

    Args:
        pictures: `[N, C, H, W]`.
        reduction: `mean`: the mean over each direction's differences, vertical plus horizontal; `sum`: their sum per
            picture, averaged over the batch.
    """
    pictures = _at_least_fp32(pictures)
    vertical = F.mse_loss(pictures[:, :, 1:], pictures[:, :, :-1], reduction=reduction)
    horizontal = F.mse_loss(pictures[..., 1:], pictures[..., :-1], reduction=reduction)
    total = vertical + horizontal
    return total / pictures.shape[0] if reduction == "sum" else total


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
