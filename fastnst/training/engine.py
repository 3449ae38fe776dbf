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

from fastnst.losses import LossTerms, PerceptualLoss
from fastnst.models.transform_net import Painted
from fastnst.models.vgg19 import VGG19, WEIGHT_SHAPES, deepest_layer
from fastnst.training.fused_ops import convolve, convolve_backward, convolve_relu, pool, unpool
from fastnst.training.taps import Taps
from fastnst_kernels import output_to_vgg_input, output_to_vgg_input_backward, uint8_to_input


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
        # RGB, as the pictures are; see `_stages`.
        self._mean, self._gain = loss.vgg.mean.flatten(), loss.vgg.gain.flatten()
        self._shift = -self._mean * self._gain
        if beside is None:
            self._stages = _stages(loss.vgg, deepest_layer(loss.layers), self._dtype)
        else:
            assert (beside._loss.vgg, beside._loss.layers, beside._dtype) == (loss.vgg, loss.layers, self._dtype)
            self._stages = beside._stages

    @torch.no_grad()
    def content_targets(self, content: Tensor) -> dict[str, Tensor]:
        """φ of the content pictures at the content layers, for any number of calls.

        Args:
            content: `[N, 3, H, W]`, RGB, floating in [0, 1] or uint8.

        Raises:
            UserError: the pictures are too small for a layer.
        """
        layers = self._loss.config.content_layers
        targets: dict[str, Tensor] = {}
        if layers:
            self._loss.vgg.check(content, layers)
            for kept in self._forward(self._input_of(content), layers, for_backward=False):
                targets |= {name: x for name, x in kept.outputs().items() if name in layers}
        return targets

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
        self._loss.vgg.check(stylized, self._loss.layers)
        as_it_is = Painted((0, 0, *stylized.shape[2:]), False, 1.0, 0.0)
        return self.of_raw(stylized, as_it_is, targets, d_total)

    @torch.no_grad()
    def of_raw(
        self, raw: Tensor, painted: Painted, targets: Mapping[str, Tensor], d_total: Tensor | None = None
    ) -> tuple[LossTerms, Tensor]:
        """As a call with the stylised pictures, from what the transform net's last layer put out, and back to there.

        Args:
            raw: `[N, 3, H', W']`.
            painted: what of it are the pictures.
            targets: as above.
            d_total: as above.

        Returns:
            The terms, and d_total · ∂total/∂raw, of raw's shape and type.

        Raises:
            ValueError: as above.
            UserError: as above.
        """
        loss = self._loss
        loss.vgg.check(raw[:, :, : painted.window[2], : painted.window[3]], loss.layers)
        taps = Taps(loss, targets, d_total)
        u, sums = self.entered(raw, painted)
        vertical, horizontal, watch = sums.sum(0)
        variation = loss.tv.weights(u.shape) if loss.tv.factor else (0.0, 0.0)
        kept = self.forward(u)
        del u
        gradient = self._backward(kept, taps)
        raw_gradient = output_to_vgg_input_backward(
            *(raw, gradient, self._gain),
            window=painted.window,
            tanh=painted.tanh,
            factor=painted.factor,
            variation=variation,
            d_variation=d_total,
            watch=watch,
        )
        tv = torch.zeros_like(watch)
        if loss.tv.factor:
            tv = variation[0] * vertical + variation[1] * horizontal
        return taps.terms(tv, watch), raw_gradient

    def entered(self, raw: Tensor, painted: Painted) -> tuple[Tensor, Tensor]:
        """φ's input `[N, 3, H, W]` for the pictures in `raw`, and the sums that `output_to_vgg_input` gives."""
        return output_to_vgg_input(raw, self._mean, self._gain, **painted._asdict(), dtype=self._dtype)

    @torch.no_grad()
    def forward(self, u: Tensor) -> list["Kept"]:
        """What the backward of a batch needs, front to back; `u` is what `entered` gives."""
        return list(self._forward(u, self._loss.layers, for_backward=True))

    def _input_of(self, pictures: Tensor) -> Tensor:
        """φ's input for `pictures` `[N, 3, H, W]`, floating or uint8, in `dtype`."""
        if pictures.dtype == torch.uint8:
            return uint8_to_input(pictures, 1 / 255, self._gain, self._shift, dtype=self._dtype)
        u = pictures.contiguous(memory_format=torch.channels_last) - self._mean.view(3, 1, 1)
        return u.mul_(self._gain.view(3, 1, 1)).to(self._dtype)

    def _forward(self, x: Tensor, taps: tuple[str, ...], *, for_backward: bool) -> Iterator["Kept"]:
        """Each stage, up to the deepest of `taps`, and what it leaves; x is the first convolution's input, RGB."""
        last = deepest_layer(taps)
        for stage in self._stages:
            kept = Kept(stage)
            if stage.conv in taps:
                x = kept.conv_out = convolve(x, stage.weight, stage.bias)
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
            gradient = convolve_backward(gradient, stage.weight)
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
        if conv == "conv1_1" and vgg.flavour == "caffe":
            weight = weight.flip(1)  # it takes BGR, and is given RGB
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
