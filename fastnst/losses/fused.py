"""The perceptual loss with its own hand-written gradient: no autograd graph, and no weight gradients.

Legend: φ the frozen VGG19 up to the deepest layer in use; L the loss. A stage is a convolution, its ReLU and, where a
block ends, the pooling with its switches, a 0/1 matrix S:

    z = W ∗ x + b        y = max(z, 0)        p = S y

Backward, a stage from ∂L/∂p or ∂L/∂y to ∂L/∂x, Wᵀ ∗ being the transposed convolution:

    ∂L/∂y = Sᵀ ∂L/∂p     ∂L/∂z = [y > 0]·(∂L/∂y + gradient of the losses on y)     ∂L/∂x = Wᵀ ∗ ∂L/∂z

p holds values of y, so the mask can be applied to p, a quarter of the elements: ∂L/∂z = Sᵀ([p > 0]·∂L/∂p). A stage
therefore saves y, or p and the switches, and both only if both have a loss. A loss before a ReLU needs z as well. The
backward frees each stage's activations as soon as it has used them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst.losses.conv_ops import convolve, convolve_backward, convolve_relu, pool, unpool
from fastnst.losses.fused_terms import FusedLossTerms
from fastnst.losses.perceptual import LossTerms, PerceptualLoss
from fastnst.models.transform_net import OutputMapping
from fastnst.models.vgg19 import VGG19, WEIGHT_SHAPES, deepest_layer
from fastnst_kernels import output_to_vgg_input, output_to_vgg_input_backward, uint8_to_input


class FusedPerceptualLoss:
    """Computes `PerceptualLoss` and its gradient with respect to the stylized images.

    φ's convolutions run in `dtype`, whatever autocast says; Grams, losses and sums of gradients in fp32, or fp64.
    `convolve_relu` may turn NaN into 0, so the stylized images are checked first: a NaN or infinity in them makes the
    total and the whole gradient NaN.

    Args:
        loss: on the device. φ's weights are copied now; the style is read at each call.
        dtype: type of φ's convolutions; None: that of its weights.
        shared_vgg: the fused loss of another style on the same φ, layers and type, to share its copy of the weights.
    """

    def __init__(
        self, loss: PerceptualLoss, dtype: torch.dtype | None = None, *, shared_vgg: "FusedPerceptualLoss | None" = None
    ) -> None:
        self._loss = loss
        self._dtype = dtype or loss.vgg.mean.dtype
        # In RGB, as the images; see `_stages`.
        self._mean, self._gain = loss.vgg.mean.flatten(), loss.vgg.gain.flatten()
        self._shift = -self._mean * self._gain
        if shared_vgg is None:
            self._stages = _stages(loss.vgg, deepest_layer(loss.layers), self._dtype)
        else:
            shared = (shared_vgg._loss.vgg, shared_vgg._loss.layers, shared_vgg._dtype)
            assert shared == (loss.vgg, loss.layers, self._dtype)
            self._stages = shared_vgg._stages

    @torch.no_grad()
    def content_targets(self, content: Tensor) -> dict[str, Tensor]:
        """Compute φ at the content layers of images `[N, 3, H, W]`, RGB, floating in [0, 1] or uint8.

        Raises:
            UserError: the images are too small for a layer.
        """
        layers = self._loss.config.content_layers
        targets: dict[str, Tensor] = {}
        if layers:
            self._loss.vgg.check(content, layers)
            for saved in self._forward(self._input_of(content), layers, for_backward=False):
                targets |= {name: x for name, x in saved.outputs().items() if name in layers}
        return targets

    def __call__(
        self, stylized: Tensor, targets: Mapping[str, Tensor], grad_output: Tensor | None = None
    ) -> tuple[LossTerms, Tensor]:
        """Compute the loss of a batch and its gradient.

        Args:
            stylized: `[N, 3, H, W]`, RGB in [0, 1].
            targets: `content_targets` of the original images.
            grad_output: factor of the gradient, 0-d on the device, such as a loss scale; None: 1.

        Returns:
            The terms, and grad_output · ∂total/∂stylized `[N, 3, H, W]` in the type of `stylized`.

        Raises:
            ValueError: the loss has no style, or the targets belong to images of another size.
            UserError: the images are too small for a layer.
        """
        self._loss.vgg.check(stylized, self._loss.layers)
        identity = OutputMapping((0, 0, *stylized.shape[2:]), False, 1.0, 0.0)
        return self.loss_and_grad(stylized, identity, targets, grad_output)

    @torch.no_grad()
    def loss_and_grad(
        self,
        pre_activation: Tensor,
        output_mapping: OutputMapping,
        targets: Mapping[str, Tensor],
        grad_output: Tensor | None = None,
    ) -> tuple[LossTerms, Tensor]:
        """Compute the loss and its gradient at the transform net's last layer, before its output mapping.

        Args:
            pre_activation: `[N, 3, H', W']`, the last layer's output.
            output_mapping: maps it to the stylized images.
            targets: as in a call, like the errors.
            grad_output: as in a call.

        Returns:
            The terms, and grad_output · ∂total/∂pre_activation, of its shape and type.
        """
        loss, window = self._loss, output_mapping.window
        loss.vgg.check(pre_activation[:, :, : window[2], : window[3]], loss.layers)
        fused_terms = FusedLossTerms(loss, targets, grad_output)
        u, sums = self.preprocess(pre_activation, output_mapping)
        vertical, horizontal, nonfinite = sums.sum(0)
        variation = loss.tv.weights(u.shape) if loss.tv.factor else (0.0, 0.0)
        saved = self.forward(u)
        del u
        gradient = output_to_vgg_input_backward(
            *(pre_activation, self._backward(saved, fused_terms), self._gain),
            window=window,
            tanh=output_mapping.tanh,
            factor=output_mapping.factor,
            variation=variation,
            d_variation=grad_output,
            watch=nonfinite,
        )
        tv = torch.zeros_like(nonfinite)
        if loss.tv.factor:
            tv = variation[0] * vertical + variation[1] * horizontal
        return fused_terms.terms(tv, nonfinite), gradient

    def preprocess(self, pre_activation: Tensor, output_mapping: OutputMapping) -> tuple[Tensor, Tensor]:
        """φ's input `[N, 3, H, W]` for the stylized images, and the sums of `output_to_vgg_input`."""
        mapping = output_mapping._asdict()
        return output_to_vgg_input(pre_activation, self._mean, self._gain, **mapping, dtype=self._dtype)

    @torch.no_grad()
    def forward(self, u: Tensor) -> list["SavedActivations"]:
        """Run φ on the result of `preprocess`; return the activations that the backward needs, front to back."""
        return list(self._forward(u, self._loss.layers, for_backward=True))

    def _input_of(self, images: Tensor) -> Tensor:
        """φ's input for `images` `[N, 3, H, W]`, floating or uint8, in `dtype`."""
        if images.dtype == torch.uint8:
            return uint8_to_input(images, 1 / 255, self._gain, self._shift, dtype=self._dtype)
        u = images.contiguous(memory_format=torch.channels_last) - self._mean.view(3, 1, 1)
        return u.mul_(self._gain.view(3, 1, 1)).to(self._dtype)

    def _forward(self, x: Tensor, layers: tuple[str, ...], *, for_backward: bool) -> Iterator["SavedActivations"]:
        """Run φ on `x`, RGB, stage by stage up to the deepest of `layers`."""
        last = deepest_layer(layers)
        for stage in self._stages:
            saved = SavedActivations(stage)
            if stage.conv in layers:
                x = saved.conv_out = convolve(x, stage.weight, stage.bias)
                x = x if stage.conv == last else F.relu(x)
            else:
                x = convolve_relu(x, stage.weight, stage.bias)
            pools = stage.pool is not None and last not in (stage.conv, stage.relu)
            if stage.relu in layers or not (pools or stage.conv == last):
                saved.relu_out = x
            if pools:
                saved.size = (x.shape[2], x.shape[3])
                x, saved.switches = pool(x, switches=for_backward)
                if stage.pool in layers or saved.relu_out is None:
                    saved.pool_out = x
            yield saved
            if last in (stage.conv, stage.relu, stage.pool):
                return

    def _backward(self, saved: list["SavedActivations"], terms: FusedLossTerms) -> Tensor:
        """∂L/∂(φ's input); empties `saved`."""
        gradient: Tensor | None = None
        while saved:
            of_stage = saved.pop()
            stage = of_stage.stage
            if of_stage.pool_out is not None:
                gradient = terms.relu_grad(stage.pool, of_stage.pool_out, gradient)
                of_stage.pool_out = None
            if of_stage.switches is not None:
                assert gradient is not None
                gradient = unpool(gradient, of_stage.switches, of_stage.size)
                of_stage.switches = None
            if of_stage.relu_out is not None:
                gradient = terms.relu_grad(stage.relu, of_stage.relu_out, gradient)
                of_stage.relu_out = None
            if of_stage.conv_out is not None:
                gradient = terms.grad(stage.conv, of_stage.conv_out, gradient)
                of_stage.conv_out = None
            assert gradient is not None
            gradient = convolve_backward(gradient, stage.weight)
        assert gradient is not None
        return gradient


@dataclass(frozen=True)
class _Stage:
    """A convolution of φ with the ReLU and pooling after it, weights ready for use."""

    conv: str
    relu: str
    pool: str | None
    weight: Tensor
    bias: Tensor


@dataclass
class SavedActivations:
    """A stage's z, y, p `[N, C, H, W]` and switches, as far as the backward needs them."""

    stage: _Stage
    conv_out: Tensor | None = None
    relu_out: Tensor | None = None
    pool_out: Tensor | None = None
    switches: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    """Height and width of y, if it is pooled."""

    def outputs(self) -> dict[str, Tensor]:
        """Saved outputs by layer."""
        named = {self.stage.conv: self.conv_out, self.stage.relu: self.relu_out, self.stage.pool: self.pool_out}
        return {name: x for name, x in named.items() if name is not None and x is not None}


def _stages(vgg: VGG19, last: str, dtype: torch.dtype) -> list[_Stage]:
    names = vgg.layers[: vgg.layers.index(last) + 1]
    stages = []
    for conv in (name for name in names if name.startswith("conv")):
        block, index = conv.removeprefix("conv").split("_")
        ends_block = f"conv{block}_{int(index) + 1}" not in WEIGHT_SHAPES
        weight, bias = (vgg.get_parameter(f"{conv}.{name}").detach() for name in ("weight", "bias"))
        if conv == "conv1_1" and vgg.flavour == "caffe":
            weight = weight.flip(1)  # it takes BGR, and gets RGB
        stages.append(
            _Stage(
                conv,
                conv.replace("conv", "relu"),
                f"pool{block}" if ends_block else None,
                weight.to(dtype).contiguous(memory_format=torch.channels_last),
                bias.to(dtype),
            )
        )
    return stages
