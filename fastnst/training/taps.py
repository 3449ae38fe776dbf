"""Losses measured on a layer of φ, and what each adds to the gradient there."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastnst.losses import ContentTerm, LossTerms, PerceptualLoss, StyleTerm
from fastnst.training.fused_ops import relu_backward_
from fastnst_kernels import StyleMatrix, loss_relu_backward, style_loss_and_matrix
from fastnst_kernels.runtime import statistics_dtype


class Taps:
    """The content and style terms of one batch: each is computed when the backward passes by its layer.

    Args:
        loss: its style is set.
        targets: the content's features by layer.
        d_total: ∂L/∂total, 0-d on the device; None: 1.
    """

    def __init__(self, loss: PerceptualLoss, targets: Mapping[str, Tensor], d_total: Tensor | None) -> None:
        self._loss, self._targets, self._d_total = loss, targets, d_total
        self._content: dict[str, Tensor] = {}
        self._style: dict[str, Tensor] = {}

    def through_relu(self, layer: str | None, features: Tensor, incoming: Tensor | None) -> Tensor:
        """∂L/∂(the ReLU's input): [features > 0]·(incoming + this layer's terms), in one pass.

        Args:
            layer: of the features; it need not be tapped.
            features: `[N, C, H, W]`, a ReLU's output or pooled values of it.
            incoming: ∂L/∂features from the layers above, which is overwritten; None at the deepest.
        """
        content, style = self._content_share(layer, features), self._style_share(layer, features)
        if content is None and style is None:
            assert incoming is not None
            return relu_backward_(incoming, features)
        target, content_factor = content or (None, None)
        matrix, style_factor = style or (None, None)
        return loss_relu_backward(
            features,
            incoming=incoming,
            style_matrix=matrix,
            style_factor=style_factor,
            content_target=target,
            content_factor=content_factor,
        )

    def without_relu(self, layer: str, features: Tensor, incoming: Tensor | None) -> Tensor:
        """∂L/∂features: incoming + this layer's terms, of which there is at least one; arguments as above."""
        total = incoming
        if (style := self._style_share(layer, features)) is not None:
            matrix, factor = style
            share: Tensor = torch.ops.fastnst.style_backward(features, matrix.values, matrix.scale, factor / 2)
            total = share if total is None else total.add_(share)
        if (content := self._content_share(layer, features)) is not None:
            target, factor = content
            share = (features.to(factor.dtype) - target).mul_(factor.view(-1, 1, 1, 1))
            total = share.to(features.dtype) if total is None else total.add_(share)
        assert total is not None
        return total

    def terms(self, tv: Tensor, watch: Tensor) -> LossTerms:
        """All terms, once the backward is through; `watch`, 0 or NaN, is added to the total."""
        zero = torch.zeros_like(tv)
        content = sum((self._content[layer] for layer in self._loss.content), zero)
        style = sum((self._style[layer] for layer in self._loss.style), zero)
        layers = {f"content/{layer}": self._content[layer] for layer in self._loss.content}
        layers |= {f"style/{layer}": self._style[layer] for layer in self._loss.style}
        return LossTerms(self._loss.total(content, style, tv) + watch, content, style, tv, layers)

    def _content_share(self, layer: str | None, features: Tensor) -> tuple[Tensor, Tensor] | None:
        """The target and the factor of `loss_relu_backward`; takes the term down."""
        if layer is None or layer not in self._loss.content:
            return None
        term, target = self._loss.content[layer], self._targets[layer]
        assert isinstance(term, ContentTerm)
        if features.shape != target.shape:
            raise ValueError(
                f"{layer} of the stylised pictures is {list(features.shape)} and of the content {list(target.shape)}; "
                "give the content of the pictures that were stylised"
            )
        self._content[layer] = term(features, target)
        return target, self._factor(2 * term.factor / features.numel(), features)

    def _style_share(self, layer: str | None, features: Tensor) -> tuple[StyleMatrix, Tensor] | None:
        if layer is None or layer not in self._loss.style:
            return None
        term = self._loss.style[layer]
        assert isinstance(term, StyleTerm)
        losses, matrix = style_loss_and_matrix(features, term.target)
        self._style[layer] = term.weighted(losses)
        divisor = term.target.numel() if term.reduction == "mean" else 1
        return matrix, self._factor(2 * term.factor / divisor / features.shape[0], features)

    def _factor(self, value: float, features: Tensor) -> Tensor:
        """`[N]`: the term is the mean over the batch of value / 2 · N times `loss_relu_backward`'s loss."""
        factor = features.new_full((features.shape[0],), value, dtype=statistics_dtype(features))
        return factor if self._d_total is None else factor * self._d_total
