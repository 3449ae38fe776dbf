"""Shapes of the convolutions of both networks, from the configuration alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastnst.config import Config
from fastnst.models.architectures import ARCHITECTURES
from fastnst.models.transform_net import InputLayout
from fastnst.models.vgg19 import BLOCKS, deepest_layer


@dataclass(frozen=True)
class Conv:
    """A convolution of the transform net and the norm after it, on square images.

    Attributes:
        side: of the input as it is stored, padded and upsampled.
        out: side of the result.
        layout: of the norm's result, which is the next convolution's input.
    """

    name: str
    inputs: int
    outputs: int
    kernel: int
    side: int
    out: int
    transposed: bool
    has_norm: bool
    relu: bool
    residual: bool
    layout: InputLayout

    @property
    def reach(self) -> int:
        """Side of the convolution's result, before a transposed one is cropped."""
        return self.out + 1 if self.transposed else self.out

    @property
    def laid_out(self) -> int:
        """Side of the norm's result in its layout."""
        return self.layout.upsample * self.out + sum(self.layout.padding[:2])

    @property
    def flops(self) -> int:
        """FLOPs of one image and one pass: forward, input gradient and weight gradient cost the same."""
        positions = (self.side if self.transposed else self.out) ** 2
        return 2 * positions * self.inputs * self.outputs * self.kernel**2


def transform_convs(config: Config) -> tuple[int, list[Conv]]:
    """Side of the net's padded input, and the convolutions front to back."""
    spec = ARCHITECTURES[config.model.architecture]
    width, nearest = spec.base_width, spec.upsampling == "nearest"
    plan = [("conv1", 3, width, 9, 1), ("conv2", width, 2 * width, 3, 2), ("conv3", 2 * width, 4 * width, 3, 2)]
    plan += [(f"res{block}.conv{index}", 4 * width, 4 * width, 3, 1) for block in range(1, 6) for index in (1, 2)]
    plan += [("up1", 4 * width, 2 * width, 3, 1), ("up2", 2 * width, width, 3, 1), ("out", width, 3, 9, 1)]

    def input_layout(name: str, kernel: int, stride: int, size: int) -> InputLayout:
        """Layout of a convolution's input of `size`."""
        if name.startswith("up"):
            return InputLayout(2, (1,) * 4) if nearest else InputLayout()
        if spec.padding == "reflect":
            return InputLayout(padding=(kernel // 2,) * 4)
        if stride > 1:
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            return InputLayout(padding=(total // 2, total - total // 2) * 2, padding_mode="zeros")
        return InputLayout()

    size = config.data.image_size + 2 * spec.border
    first = stored = size + sum(input_layout("conv1", 9, 1, size).padding[:2])
    convs = []
    for index, (name, inputs, outputs, kernel, stride) in enumerate(plan):
        if name.startswith("up"):
            size = 2 * size
        elif name.startswith("res"):
            size = size - 2 if spec.block_padding == "valid" else size
        else:
            size = math.ceil(size / stride)
        last = name == "out"
        layout = InputLayout()
        if not last:
            following, _, _, *shape = plan[index + 1]
            layout = input_layout(following, *shape, size)
        convs.append(
            Conv(
                name=name,
                inputs=inputs,
                outputs=outputs,
                kernel=kernel,
                side=stored,
                out=size,
                transposed=name.startswith("up") and not nearest,
                has_norm=not last or spec.norm_on_output,
                relu=not last and not name.endswith(".conv2"),
                residual=name.endswith(".conv2"),
                layout=layout,
            )
        )
        stored = convs[-1].laid_out
    return first, convs


@dataclass(frozen=True)
class VggLayer:
    """A convolution with its ReLU, or a pool."""

    name: str
    inputs: int
    outputs: int
    side: int
    """Side of the input."""

    @property
    def is_pool(self) -> bool:
        return self.name.startswith("pool")

    @property
    def relu(self) -> str:
        return self.name.replace("conv", "relu")

    @property
    def flops(self) -> int:
        """FLOPs of one image and one pass."""
        return 0 if self.is_pool else 2 * self.side**2 * self.inputs * self.outputs * 9


def vgg_layers(layers: tuple[str, ...], side: int) -> list[VggLayer]:
    """VGG19 up to the deepest of `layers`, ReLUs or pools; nothing for none."""
    if not layers:
        return []
    deepest = deepest_layer(layers)
    found: list[VggLayer] = []
    inputs = 3
    for block, (channels, convolutions) in enumerate(BLOCKS, start=1):
        for index in range(1, convolutions + 1):
            found.append(VggLayer(f"conv{block}_{index}", inputs, channels, side))
            inputs = channels
            if deepest in (found[-1].name, found[-1].relu):
                return found
        found.append(VggLayer(f"pool{block}", channels, channels, side))
        if deepest == found[-1].name:
            return found
        side //= 2
    raise AssertionError(deepest)
