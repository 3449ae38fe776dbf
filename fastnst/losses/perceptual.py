"""The perceptual loss (Johnson, Alahi, Fei-Fei 2016, equations 1 to 4) and total variation.

For a stylized image ŷ, its content x and the style image s, φ_j a layer of VGG19 with C·H·W outputs:

    content  ‖φ_j(ŷ) − φ_j(x)‖² / (C·H·W)                        eq. 2
    Gram     G_j = φ_jᵀ φ_j / (C·H·W)                            eq. 3
    style    ‖G_j(ŷ) − G_j(s)‖²_F, or its mean over the C² entries  eq. 4
    tv       the squared differences of neighbouring pixels

Each is averaged over the batch, weighted, and summed over its layers.

Scale. Loss weights fit the size of the features, which differs: Caffe's VGG is fed with 0-255 pixels,
torchvision's with pixels divided by their standard deviation σ, in [0, 1] scale about 0.226, so that its input is
smaller by s = 255·σ ≈ 57.6. Convolution, ReLU and pooling are positively homogeneous if the biases grow with the input:
fed with s·x and given s·biases, φ yields s·φ(x). Hence s·φ is torchvision's net re-expressed for 0-255 pixels, and a
content weight tuned there applies to (s·Δφ)² = s²·(Δφ)². The Gram is quadratic in φ and the style term quadratic in
the Gram: s⁴. The other way around, Caffe's features under weights tuned in the unit scale, both factors divide.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnst.config import LossConfig
from fastnst.errors import UserError
from fastnst.models.transform_net import at_least_fp32
from fastnst.models.vgg19 import VGG19
from fastnst_kernels import gram_matrix, style_loss

UNIT_TO_255 = 255.0 * (0.229 + 0.224 + 0.225) / 3.0
"""s: how much larger Caffe's 0-255 input is than torchvision's normalized one, ≈ 57.6."""


@dataclass(frozen=True)
class LossTerms:
    """The loss of one batch by term: weighted 0-d tensors, fp32 or the images' wider type."""

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
    """The perceptual loss of a stylized batch; call `set_style` first.

    Works under autocast: φ in its type, Grams, sums and losses in fp32. Each term is a module: `content` and `style`
    hold one per layer (`loss.style["relu1_1"]`, its Gram the buffer `gram`), then `tv` and `total`.

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
        self.content = LayerTerms(
            {layer: ContentTerm(config.content_weight * scale**2) for layer in config.content_layers}
        )
        per_layer = config.style_layer_weights or (1.0,) * len(config.style_layers)
        self.style = LayerTerms(
            {
                layer: StyleTerm(config.style_weight * weight * scale**4, config.style_reduction)
                for layer, weight in zip(config.style_layers, per_layer, strict=True)
            }
        )
        pixel_scale = 255.0 if config.feature_scale == "0-255" else 1.0
        self.tv = TotalVariationTerm(config.tv_weight * pixel_scale**2, config.tv_reduction)
        self.total = Total()

    @torch.no_grad()
    def set_style(self, style: Tensor) -> None:
        """Compute the style image's Grams, in fp32 whatever autocast says.

        Args:
            style: `[1, 3, H, W]`, RGB in [0, 1], large enough for the deepest style layer.

        Raises:
            UserError: another shape, or too small an image.
        """
        if style.ndim != 4 or style.shape[:2] != (1, 3):
            raise UserError(f"the style is one image [1, 3, H, W], got {list(style.shape)}")
        if not self.style:
            return
        with torch.autocast(style.device.type, enabled=False):
            for layer, activation in self.vgg(at_least_fp32(style), tuple(self.style)).items():
                self.style[layer].gram = gram_matrix(activation)[0]

    def forward(self, stylized: Tensor, content: Tensor) -> LossTerms:
        """Compute the loss of a batch, differentiable with respect to `stylized`.

        φ runs on `stylized` up to the deepest layer in use, and on `content`, without gradient, up to the deepest
        content layer.

        Args:
            stylized: `[N, 3, H, W]`, RGB in [0, 1].
            content: the same shape.

        Raises:
            ValueError: the shapes differ, or `set_style` was not called.
            UserError: the images are too small for a layer.
        """
        if stylized.shape != content.shape:
            shapes = f"stylized {list(stylized.shape)} and content {list(content.shape)}"
            raise ValueError(f"{shapes} differ in shape; give the same images")
        features = self.vgg(stylized, self.layers)
        with torch.no_grad():
            targets = self.vgg(content, self.config.content_layers) if self.content else {}
        return self.terms(stylized, features, targets)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of φ with a content or style term."""
        return tuple(dict.fromkeys((*self.config.content_layers, *self.config.style_layers)))

    def terms(self, stylized: Tensor, features: dict[str, Tensor], targets: dict[str, Tensor]) -> LossTerms:
        """Compute the loss from given features.

        Args:
            stylized: `[N, 3, H, W]`, RGB in [0, 1].
            features: φ of `stylized`, by layer: all of `layers`.
            targets: φ of the content, by layer: all content layers.
        """
        # On a CPU autocast would take squared errors, too, in its low precision.
        with torch.autocast(stylized.device.type, enabled=False):
            zero = torch.zeros((), dtype=at_least_fp32(stylized).dtype, device=stylized.device)
            content, content_layers = self.content(zero, features, targets)
            style, style_layers = self.style(zero, features)
            tv = self.tv(stylized) if self.tv.factor else zero
            layers = {f"content/{layer}": term for layer, term in content_layers.items()}
            layers |= {f"style/{layer}": term for layer, term in style_layers.items()}
            return LossTerms(self.total(content, style, tv), content, style, tv, layers)


class LayerTerms(nn.ModuleDict):
    """One term per layer of φ, and their sum."""

    def forward(self, zero: Tensor, *features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """`zero` plus the terms, and the terms by layer; each term gets its layer of each of `features`."""
        terms = {layer: term(*(activations[layer] for activations in features)) for layer, term in self.items()}
        return sum(terms.values(), zero), terms


class ContentTerm(nn.Module):
    """factor · mean over the batch of ‖φ(ŷ) − φ(x)‖² / (C·H·W) (eq. 2); both `[N, C, H, W]` → 0-d."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, activation: Tensor, target: Tensor) -> Tensor:
        return self.factor * F.mse_loss(at_least_fp32(activation), at_least_fp32(target))


class StyleTerm(nn.Module):
    """factor · mean over the batch of ‖G(ŷ) − G(s)‖²_F (eq. 4), or of its mean over the C² entries; → 0-d."""

    gram: Tensor | None

    def __init__(self, factor: float, reduction: str) -> None:
        super().__init__()
        self.factor, self.reduction = factor, reduction
        # Not persistent: a run computes it from the style image whenever it starts.
        self.register_buffer("gram", None, persistent=False)

    def forward(self, activation: Tensor) -> Tensor:
        return self.weighted(style_loss(activation, self.target))

    @property
    def target(self) -> Tensor:
        """G(s) `[C, C]`; ValueError before `set_style`."""
        if self.gram is None:
            raise ValueError("the loss has no style yet; call set_style with the style image first")
        return self.gram

    def weighted(self, losses: Tensor) -> Tensor:
        """The term from `losses` ‖G(ŷ) − G(s)‖²_F `[N]`, in which it is linear."""
        term = self.factor * losses.mean()
        return term / self.target.numel() if self.reduction == "mean" else term


class TotalVariationTerm(nn.Module):
    """factor · `total_variation` of `[N, 3, H, W]` → 0-d."""

    def __init__(self, factor: float, reduction: str) -> None:
        super().__init__()
        self.factor, self.reduction = factor, reduction

    def forward(self, stylized: Tensor) -> Tensor:
        return self.factor * total_variation(stylized, self.reduction)

    def weights(self, shape: Sequence[int]) -> tuple[float, float]:
        """Weights of the summed squared differences along height and width for images of `shape` `[N, 3, H, W]`."""
        n, c, h, w = shape
        counts = (n * c * (h - 1) * w, n * c * h * (w - 1)) if self.reduction == "mean" else (n, n)
        vertical, horizontal = (self.factor / count if count else math.nan for count in counts)  # no mean of nothing
        return vertical, horizontal


class Total(nn.Module):
    """content + style + tv."""

    def forward(self, content: Tensor, style: Tensor, tv: Tensor) -> Tensor:
        return content + style + tv


def total_variation(images: Tensor, reduction: str = "mean") -> Tensor:
    """Squared differences of neighbouring pixels of `[N, 3, H, W]`, 0-d, fp32 or wider.

    Args:
        images: `[N, C, H, W]`.
        reduction: `mean`: the mean over each direction's differences, vertical plus horizontal; `sum`: their sum per
            image, averaged over the batch.
    """
    images = at_least_fp32(images)
    vertical = F.mse_loss(images[:, :, 1:], images[:, :, :-1], reduction=reduction)
    horizontal = F.mse_loss(images[..., 1:], images[..., :-1], reduction=reduction)
    total = vertical + horizontal
    return total / images.shape[0] if reduction == "sum" else total
