"""The content and style terms of the fused loss, and their gradients layer by layer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastnst.losses.conv_ops import relu_backward_
from fastnst.losses.perceptual import ContentTerm, LossTerms, PerceptualLoss, StyleTerm
from fastnst_kernels import StyleMatrix, loss_relu_backward, style_loss_and_matrix
from fastnst_kernels.runtime import statistics_dtype


class FusedLossTerms:
    """The content and style terms of one batch, each computed when the backward reaches its layer.

    Args:
        loss: its style is set.
        targets: the content's features by layer.
        grad_output: ∂L/∂total, 0-d on the device; None: 1.
    """

    def __init__(self, loss: PerceptualLoss, targets: Mapping[str, Tensor], grad_output: Tensor | None) -> None:
        self._loss, self._targets, self._grad_output = loss, targets, grad_output
        self._content: dict[str, Tensor] = {}
        self._style: dict[str, Tensor] = {}

    def relu_grad(self, layer: str | None, features: Tensor, incoming: Tensor | None) -> Tensor:
        """∂L/∂(ReLU input): [features > 0]·(incoming + this layer's terms), in one pass.

        Args:
            layer: name of the features' layer; it need not have a term.
            features: `[N, C, H, W]`, a ReLU's output, or that pooled.
            incoming: ∂L/∂features from the layers above, which is overwritten; None at the deepest.
        """
        content, style = self._content_term(layer, features), self._style_term(layer, features)
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

    def grad(self, layer: str, features: Tensor, incoming: Tensor | None) -> Tensor:
        """∂L/∂features: incoming + this layer's terms, at least one; arguments as in `relu_grad`."""
        total = incoming
        if (style := self._style_term(layer, features)) is not None:
            matrix, factor = style
            term: Tensor = torch.ops.fastnst.style_backward(features, matrix.values, matrix.scale, factor / 2)
            total = term if total is None else total.add_(term)
        if (content := self._content_term(layer, features)) is not None:
            target, factor = content
            term = (features.to(factor.dtype) - target).mul_(factor.view(-1, 1, 1, 1))
            total = term.to(features.dtype) if total is None else total.add_(term)
        assert total is not None
        return total

    def terms(self, tv: Tensor, nonfinite: Tensor) -> LossTerms:
        """All terms, after the backward; `nonfinite`, 0 or NaN, is added to the total."""
        zero = torch.zeros_like(tv)
        content = sum((self._content[layer] for layer in self._loss.content), zero)
        style = sum((self._style[layer] for layer in self._loss.style), zero)
        layers = {f"content/{layer}": self._content[layer] for layer in self._loss.content}
        layers |= {f"style/{layer}": self._style[layer] for layer in self._loss.style}
        return LossTerms(self._loss.total(content, style, tv) + nonfinite, content, style, tv, layers)

    def _content_term(self, layer: str | None, features: Tensor) -> tuple[Tensor, Tensor] | None:
        """Record the layer's content term; return its target and its factor in `loss_relu_backward`."""
        if layer is None or layer not in self._loss.content:
            return None
        term, target = self._loss.content[layer], self._targets[layer]
        assert isinstance(term, ContentTerm)
        if features.shape != target.shape:
            raise ValueError(
                f"{layer} of the stylized images is {list(features.shape)} and of the content {list(target.shape)}; "
                "give the content of the same images"
            )
        self._content[layer] = term(features, target)
        return target, self._factor(2 * term.factor / features.numel(), features)

    def _style_term(self, layer: str | None, features: Tensor) -> tuple[StyleMatrix, Tensor] | None:
        """Record the layer's style term; return its matrix and its factor in `loss_relu_backward`."""
        if layer is None or layer not in self._loss.style:
            return None
        term = self._loss.style[layer]
        assert isinstance(term, StyleTerm)
        losses, matrix = style_loss_and_matrix(features, term.target)
        self._style[layer] = term.weighted(losses)
        divisor = term.target.numel() if term.reduction == "mean" else 1
        return matrix, self._factor(2 * term.factor / divisor / features.shape[0], features)

    def _factor(self, value: float, features: Tensor) -> Tensor:
        """`value` per image, `[N]`, times `grad_output`."""
        factor = features.new_full((features.shape[0],), value, dtype=statistics_dtype(features))
        return factor if self._grad_output is None else factor * self._grad_output
