"""The convolutions of both networks with their shapes, from the configuration alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastnst.config import Config
from fastnst.models.vgg19 import BLOCKS, deepest_layer


@dataclass(frozen=True)
class Conv:
    """A convolution of the transform net and the norm behind it. Sides are of squares.

    Attributes:
        side: of the input as it is stored, with its border and enlargement.
        reach: of the part that the convolution makes, before a transposed one is cut.
        out: of the result.
        residual: side of the image that the norm adds; 0: none.
        own_border: pixels around what the residual counts.
        upsample, border: how the norm places its result for the next convolution; what that adds to the side.
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
    upsample: int
    padding: tuple[int, int, int, int]
    mode: str

    @property
    def reach(self) -> int:
        return self.out + 1 if self.transposed else self.out

    @property
    def placed(self) -> int:
        """Side of what the norm writes."""
        return self.upsample * self.out + self.padding[0] + self.padding[1]

    @property
    def flops(self) -> int:
        """Of one image and one pass: forward, gradient of the input, gradient of the weight cost the same."""
        positions = (self.side if self.transposed else self.out) ** 2
        return 2 * positions * self.inputs * self.outputs * self.kernel**2


def transform_convs(config: Config) -> tuple[int, list[Conv]]:
    """Side of the net's input as it is stored, and the convolutions front to back."""
    architecture, side = config.model.architecture, config.data.image_size
    johnson, cuts = architecture == "johnson", architecture == "hwalsuklee"
    plan = [("conv1", 3, 32, 9, 1), ("conv2", 32, 64, 3, 2), ("conv3", 64, 128, 3, 2)]
    plan += [(f"res{block}.conv{index}", 128, 128, 3, 1) for block in range(1, 6) for index in (1, 2)]
    plan += [("up1", 128, 64, 3, 1), ("up2", 64, 32, 3, 1), ("out", 32, 3, 9, 1)]

    def placing(name: str, kernel: int, stride: int, size: int) -> tuple[int, tuple[int, int, int, int], str]:
        """How a convolution wants an image of `size`."""
        if name.startswith("up"):
            return (2, (1,) * 4, "reflect") if johnson else (1, (0,) * 4, "reflect")
        if johnson:
            return 1, (kernel // 2,) * 4, "reflect"
        if stride > 1:
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            return 1, (total // 2, total - total // 2) * 2, "zeros"
        return 1, (0,) * 4, "reflect"

    size = side + 80 if cuts else side
    _, padding, _ = placing("conv1", 9, 1, size)
    first = stored = size + padding[0] + padding[1]
    convs = []
    for index, (name, inputs, outputs, kernel, stride) in enumerate(plan):
        in_block = name.startswith("res")
        if name.startswith("up"):
            size = 2 * size
        elif in_block:
            size = size - 2 if cuts else size
        else:
            size = math.ceil(size / stride)
        last = name == "out"
        following = None if last else plan[index + 1]
        place = (1, (0,) * 4, "reflect")
        if following is not None:
            place = placing(following[0], following[3], following[4], size)
        convs.append(
            Conv(
                name=name,
                inputs=inputs,
                outputs=outputs,
                kernel=kernel,
                side=stored,
                out=size,
                transposed=name.startswith("up") and not johnson,
                has_norm=not (last and johnson),
                relu=not last and not name.endswith(".conv2"),
                residual=name.endswith(".conv2"),
                upsample=place[0],
                padding=place[1],
                mode=place[2],
            )
        )
        stored = convs[-1].placed
    return first, convs


@dataclass(frozen=True)
class VggLayer:
    """A convolution with its ReLU, or a pool."""

    name: str
    inputs: int
    outputs: int
    side: int
    """Of the input."""

    @property
    def is_pool(self) -> bool:
        return self.name.startswith("pool")

    @property
    def relu(self) -> str:
        return self.name.replace("conv", "relu")

    @property
    def flops(self) -> int:
        """Of one image and one pass."""
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
