"""Transform nets of three published implementations, a row each: a new one needs no other code.

hwalsuklee: hwalsuklee/tensorflow-fast-style-transfer; lengstrom: lengstrom/fast-style-transfer; johnson:
pytorch/examples.

TF "SAME" at stride 2 pads nothing before and one zero after an even side; weights trained in TensorFlow depend on it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Padding = Literal["same", "valid", "reflect"]


@dataclass(frozen=True)
class ArchitectureSpec:
    """How a transform net differs from the others; `transform_net` says what all share."""

    padding: Padding
    """Of every convolution outside the residual blocks: zeros as TF "SAME" has them, or reflected."""
    block_padding: Padding
    """Of the convolutions in the residual blocks."""
    border: int
    """Pixels reflected at each side of the image before the first layer."""
    upsampling: Literal["transposed", "nearest"]
    """Transposed convolution, or nearest-neighbour ×2 and a convolution."""
    eps: float
    """ε of the norms."""
    norm_on_output: bool
    """Whether a norm follows the last convolution, in place of its bias."""
    input_scale: float
    """What an image in [0, 1] is multiplied by."""
    tanh: bool
    factor: float
    offset: float
    """Output mapping, to [0, 1]: factor · tanh?(last layer) + offset."""
    init: Literal["truncated_normal", "uniform"]
    init_scale: Callable[[int], float]
    """fan-in → standard deviation of a normal truncated at two of them, or bound of a uniform distribution."""
    base_width: int = 32
    """Channels of the first layer; the two strided layers double them."""


ARCHITECTURES: dict[str, ArchitectureSpec] = {
    "hwalsuklee": ArchitectureSpec(
        padding="same",
        block_padding="valid",
        border=40,
        upsampling="transposed",
        eps=1e-3,
        norm_on_output=True,
        input_scale=1.0,
        tanh=True,
        factor=0.5,
        offset=0.5,
        init="truncated_normal",
        # Variance 2 / fan-in. The 1.3 makes up for what truncation takes away.
        init_scale=lambda fan_in: math.sqrt(1.3 * 2.0 / fan_in),
    ),
    "lengstrom": ArchitectureSpec(
        padding="same",
        block_padding="same",
        border=0,
        upsampling="transposed",
        eps=1e-3,
        norm_on_output=True,
        input_scale=1.0,
        tanh=True,
        factor=150.0 / 255.0,
        offset=0.5,
        init="truncated_normal",
        init_scale=lambda _: 0.1,
    ),
    "johnson": ArchitectureSpec(
        padding="reflect",
        block_padding="reflect",
        border=0,
        upsampling="nearest",
        eps=1e-5,
        norm_on_output=False,
        input_scale=255.0,
        tanh=False,
        factor=1.0 / 255.0,
        offset=0.0,
        init="uniform",  # PyTorch's default
        init_scale=lambda fan_in: 1.0 / math.sqrt(fan_in),
    ),
}
