"""The loss network and its losses as one function that takes its own gradient: no graph, and no weight gradients.

Legend: φ the frozen VGG19 up to the deepest layer in use; L the loss. A stage is a convolution, its ReLU and, where a
block ends, the pooling, whose switches are a 0/1 matrix S:

    z = W ∗ x + b        y = max(z, 0)        p = S y

Backward, a stage from ∂L/∂p or ∂L/∂y to ∂L/∂x, Wᵀ ∗ being the transposed convolution:

    ∂L/∂y = Sᵀ ∂L/∂p     ∂L/∂z = [y > 0]·(∂L/∂y + what losses on y add)     ∂L/∂x = Wᵀ ∗ ∂L/∂z

p holds values of y, so that the mask may be taken there, on a quarter of the elements: ∂L/∂z = Sᵀ([p > 0]·∂L/∂p). A
stage therefore leaves y for the backward, or p and the switches instead, and both only where a loss is measured on
both. A loss before a ReLU needs z as well. Whatever the backward has used is freed before it goes on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst.losses import LossTerms, PerceptualLoss, total_variation_gradient
from fastnst.models.vgg19 import VGG19, WEIGHT_SHAPES, deepest_layer
from fastnst.training.fused_ops import convolve_relu, pool, unpool
from fastnst.training.taps import Taps


class LossEngine:
    """What `PerceptualLoss` computes, and its gradient with respect to the stylised pictures.

    φ's convolutions run in `dtype`, whatever autocast says; Grams, losses and sums of gradients in fp32, or fp64.

    `fused_ops.convolve_relu` may turn NaN into 0. A NaN or an infinity in the stylised pictures is therefore looked for
    there, and makes the total and the whole gradient NaN.

    Args:
        loss: on the device. Its φ's weights are taken now, its style whenever it is called.
        dtype: type of φ's convolutions; None: that of its weights.
        beside: an engine of another loss on the same φ and layers, in the same type: its weights are shared.
    """

    def __init__(
        self, loss: PerceptualLoss, dtype: torch.dtype | None = None, *, beside: "LossEngine | None" = None
    ) -> None:
        self._loss = loss
        self._dtype = dtype or loss.vgg.mean.dtype
        if beside is None:
            self._stages = _stages(loss.vgg, deepest_layer(loss.layers), self._dtype)
        else:
            assert (beside._loss.vgg, beside._loss.layers, beside._dtype) == (loss.vgg, loss.layers, self._dtype)
            self._stages = beside._stages

    @torch.no_grad()
    def content_targets(self, content: Tensor) -> dict[str, Tensor]:
        """φ of the content pictures at the content layers, for any number of calls.

        Args:
            content: `[N, 3, H, W]`, RGB in [0, 1].

        Raises:
            UserError: the pictures are too small for a layer.
        """
        layers = self._loss.config.content_layers
        targets: dict[str, Tensor] = {}
        if layers:
            self._loss.vgg.check(content, layers)
            for kept in self._forward(content, layers, for_backward=False):
                targets |= {name: x for name, x in kept.outputs().items() if name in layers}
        return targets

    @torch.no_grad()
    def __call__(
        self, stylized: Tensor, targets: Mapping[str, Tensor], d_total: Tensor | None = None
    ) -> tuple[LossTerms, Tensor]:
        """The loss of a batch and its gradient.

        Args:
            stylized: `[N, 3, H, W]`, RGB in [0, 1].
            targets: `content_targets` of the pictures that were stylised.
            d_total: what the gradient is multiplied by, 0-d on the device, such as a loss scale; None: 1.

        Returns:
            The terms, and d_total · ∂total/∂stylized `[N, 3, H, W]` in the type of `stylized`.

        Raises:
            ValueError: the loss has no style, or the targets are those of pictures of another size.
            UserError: the pictures are too small for a layer.
        """
        loss = self._loss
        loss.vgg.check(stylized, loss.layers)
        taps = Taps(loss, targets, d_total)
        gradient = self._backward(self.forward(stylized), taps)
        watch = stylized.sum() * 0.0  # NaN unless all of it is finite
        gradient = gradient.flip(1) if loss.vgg.flavour == "caffe" else gradient
        gradient = (gradient * (loss.vgg.gain + watch)).to(stylized.dtype)
        tv = torch.zeros_like(watch)
        if loss.tv.factor:
            tv = loss.tv(stylized)
            factor = loss.tv.factor if d_total is None else loss.tv.factor * d_total
            gradient += total_variation_gradient(stylized, loss.tv.reduction).mul_(factor)
        return taps.terms(tv, watch), gradient

    @torch.no_grad()
    def forward(self, stylized: Tensor) -> list["Kept"]:
        """What the backward of a batch needs, front to back."""
        return list(self._forward(stylized, self._loss.layers, for_backward=True))

    def _forward(self, pictures: Tensor, taps: tuple[str, ...], *, for_backward: bool) -> Iterator["Kept"]:
        """Each stage, up to the deepest of `taps`, and what it leaves."""
        last = deepest_layer(taps)
        x = self._loss.vgg.preprocess(pictures).to(self._dtype)
        for stage in self._stages:
            kept = Kept(stage)
            if stage.conv in taps:
                x = kept.conv_out = F.conv2d(x, stage.weight, stage.bias, padding=1)
                x = x if stage.conv == last else F.relu(x)
            else:
                x = convolve_relu(x, stage.weight, stage.bias)
            pools = stage.pool is not None and last not in (stage.conv, stage.relu)
            if stage.relu in taps or not (pools or stage.conv == last):
                kept.relu_out = x
            if pools:
                kept.size = (x.shape[2], x.shape[3])
                x, kept.switches = pool(x, switches=for_backward)
                if stage.pool in taps or kept.relu_out is None:
                    kept.pool_out = x
            yield kept
            if last in (stage.conv, stage.relu, stage.pool):
                return

    def _backward(self, kept: list["Kept"], taps: Taps) -> Tensor:
        """∂L/∂x of what the first convolution was fed with; empties `kept`."""
        gradient: Tensor | None = None
        while kept:
            done = kept.pop()
            stage = done.stage
            if done.pool_out is not None:
                gradient = taps.through_relu(stage.pool, done.pool_out, gradient)
                done.pool_out = None
            if done.switches is not None:
                assert gradient is not None
                gradient = unpool(gradient, done.switches, done.size)
                done.switches = None
            if done.relu_out is not None:
                gradient = taps.through_relu(stage.relu, done.relu_out, gradient)
                done.relu_out = None
            if done.conv_out is not None:
                gradient = taps.without_relu(stage.conv, done.conv_out, gradient)
                done.conv_out = None
            assert gradient is not None
            gradient = F.conv_transpose2d(gradient, stage.weight, padding=1)
        assert gradient is not None
        return gradient


@dataclass(frozen=True)
class _Stage:
    """Names of a convolution and of what follows it, and its weights, ready for use."""

    conv: str
    relu: str
    pool: str | None
    weight: Tensor
    bias: Tensor


@dataclass
class Kept:
    """What a stage leaves for the backward, `[N, C, H, W]` each: z, y, p and the switches, as far as needed."""

    stage: _Stage
    conv_out: Tensor | None = None
    relu_out: Tensor | None = None
    pool_out: Tensor | None = None
    switches: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    """Height and width of y, where it is pooled."""

    def outputs(self) -> dict[str, Tensor]:
        """Layer → what it put out."""
        named = {self.stage.conv: self.conv_out, self.stage.relu: self.relu_out, self.stage.pool: self.pool_out}
        return {name: x for name, x in named.items() if name is not None and x is not None}


def _stages(vgg: VGG19, last: str, dtype: torch.dtype) -> list[_Stage]:
    names = vgg.layers[: vgg.layers.index(last) + 1]
    stages = []
    for conv in (name for name in names if name.startswith("conv")):
        block, index = conv.removeprefix("conv").split("_")
        following = f"pool{block}"
        is_last_of_block = f"conv{block}_{int(index) + 1}" not in WEIGHT_SHAPES
        weight, bias = (vgg.get_parameter(f"{conv}.{name}").detach() for name in ("weight", "bias"))
        stages.append(
            _Stage(
                conv,
                conv.replace("conv", "relu"),
                following if is_last_of_block else None,
                weight.to(dtype).contiguous(memory_format=torch.channels_last),
                bias.to(dtype),
            )
        )
    return stages
