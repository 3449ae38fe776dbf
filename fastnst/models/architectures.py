"""Transform nets of three published implementations, a row each; `config.ModelConfig` lists their names.

hwalsuklee: hwalsuklee/tensorflow-fast-style-transfer; lengstrom: lengstrom/fast-style-transfer; johnson:
pytorch/examples.

TF "SAME" at stride 2 pads nothing before and one zero after an even side; weights trained in TensorFlow depend on it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Padding = Literal["same", "valid", "reflect"]


@dataclass(frozen=True, kw_only=True)
class ArchitectureSpec:
    """How a transform net differs from the others; `transform_net` describes their common shape."""

    padding: Padding = "same"
    """Of every convolution outside the residual blocks: TF "SAME" zeros, or reflection."""
    block_padding: Padding
    """Of the convolutions in the residual blocks."""
    border: int = 0
    """Pixels reflected at each side of the image before the first layer."""
    upsampling: Literal["transposed", "nearest"] = "transposed"
    """Transposed convolution, or nearest-neighbour ×2 and a convolution."""
    eps: float = 1e-3
    """ε of the norms."""
    norm_on_output: bool = True
    """Whether a norm, not a bias, follows the last convolution."""
    input_scale: float = 1.0
    """Factor of an image in [0, 1]."""
    tanh: bool = True
    factor: float
    offset: float
    """Output mapping to [0, 1]: factor · tanh?(last layer) + offset."""
    init: Literal["truncated_normal", "uniform"] = "truncated_normal"
    init_scale: Callable[[int], float]
    """fan-in → standard deviation of a normal truncated at two of them, or bound of a uniform distribution."""
    base_width: int = 32
    """Channels of the first layer; each strided layer doubles them."""


ARCHITECTURES: dict[str, ArchitectureSpec] = {
    "hwalsuklee": ArchitectureSpec(
        block_padding="valid",
        border=40,
        factor=0.5,
        offset=0.5,
        init_scale=lambda fan_in: math.sqrt(1.3 * 2.0 / fan_in),  # variance 2 / fan-in; 1.3 corrects the truncation
    ),
    "lengstrom": ArchitectureSpec(block_padding="same", factor=150.0 / 255.0, offset=0.5, init_scale=lambda _: 0.1),
    "johnson": ArchitectureSpec(
        padding="reflect",
        block_padding="reflect",
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
