"""The transform net (Johnson, Alahi, Fei-Fei 2016), in the shapes of three published implementations.

All have 9×9 conv → 32, two 3×3 stride-2 convs → 64 → 128, five residual blocks of two 3×3 convs, two ×2 upsampling
convs → 64 → 32, 9×9 conv → 3, with norm and ReLU after each; a residual block ends with its addition, without a ReLU.

| | hwalsuklee | lengstrom | johnson |
|---|---|---|---|
| follows | hwalsuklee/tensorflow-fast-style-transfer | lengstrom/fast-style-transfer | pytorch/examples |
| padding | 40 px reflected once, then TF "SAME"; blocks unpadded | TF "SAME" (zeros) | reflected before each conv |
| upsampling | transposed conv | transposed conv | nearest ×2, then conv |
| norm | ε 1e-3, also on the last layer | same | ε 1e-5, not on the last layer |
| output | 127.5 (tanh + 1) | 150 tanh + 127.5 | linear, 0-255 |
| initialisation | truncated normal, variance 2 / fan-in | truncated normal, 0.1 | PyTorch's default |

TF "SAME" at stride 2 pads nothing before and one zero after an even side; weights trained in TensorFlow depend on it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnst.errors import DataError, UserError
from fastnst.models.padding import reflect_pad
from fastnst_kernels import batch_norm, instance_norm, uint8_to_input
from fastnst_kernels.conv.convolution import convolution
from fastnst_kernels.norm.recompute import recomputed_batch_norm, recomputed_instance_norm

ARCHITECTURES = ("hwalsuklee", "lengstrom", "johnson")
NORMS = ("instance", "batch")
LAYER_NAMES = ("conv1", "conv2", "conv3", "res1", "res2", "res3", "res4", "res5", "up1", "up2", "out")
SMALLEST_SIDE = 16


class Placing(NamedTuple):
    """How a layer wants its input: what the norm before it does to its result as it writes it."""

    upsample: int = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    padding_mode: str = "reflect"


class Painted(NamedTuple):
    """What of the last layer's raw output is the picture, and how it becomes it: factor·tanh?(output) + offset."""

    window: tuple[int, int, int, int]
    """Top, left, height and width, in pixels."""
    tanh: bool
    factor: float
    offset: float


_Wants = Callable[[Tensor], Placing]


def _as_it_is(x: Tensor) -> Placing:  # noqa: ARG001
    return Placing()


class TransformNet(nn.Module):
    """The network that is trained: one picture in, the stylised picture out.

    Parameters are named `conv1.weight`, `conv1.scale`, `conv1.shift`, `res1.conv1.weight`, …, `out.weight`. A
    convolution that a norm follows has no bias, which the norm would take away again; johnson's last layer, which has
    no norm, has `out.bias` instead of scale and shift. Weights are `[out, in, k, k]`, those of transposed convolutions
    (`up1`, `up2` but in johnson) `[in, out, k, k]`. Running statistics of batch norm are buffers.

    Args:
        architecture: one of `ARCHITECTURES`.
        norm: `instance` (statistics per picture) or `batch`.
        generator: source of the initial weights; None takes PyTorch's global one.

    Raises:
        UserError: unknown architecture or norm.
    """

    layer_names = LAYER_NAMES

    def __init__(
        self, architecture: str = "hwalsuklee", norm: str = "instance", *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise UserError(f"unknown architecture {architecture!r}; choose one of {', '.join(ARCHITECTURES)}")
        if norm not in NORMS:
            raise UserError(f"unknown norm {norm!r}; choose one of {', '.join(NORMS)}")
        self.architecture = architecture
        self.norm = norm
        johnson = architecture == "johnson"
        padding = "reflect" if johnson else "same"
        block_padding = "valid" if architecture == "hwalsuklee" else padding
        eps = 1e-5 if johnson else 1e-3

        def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, *, last: bool = False) -> ConvLayer:
            layer_norm = None if last and johnson else norm
            return ConvLayer(inputs, outputs, kernel, stride, padding=padding, norm=layer_norm, eps=eps, relu=not last)

        self.conv1 = conv(3, 32, 9)
        self.conv2 = conv(32, 64, 3, 2)
        self.conv3 = conv(64, 128, 3, 2)
        for index in range(1, 6):
            self.add_module(f"res{index}", ResidualBlock(128, padding=block_padding, norm=norm, eps=eps))
        self.up1 = UpLayer(128, 64, nearest=johnson, norm=norm, eps=eps)
        self.up2 = UpLayer(64, 32, nearest=johnson, norm=norm, eps=eps)
        self.out = conv(32, 3, 9, last=True)
        self._initialise(generator)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def metadata(self) -> dict[str, str]:
        """What `from_metadata` needs to build an equal network, as strings."""
        return {"architecture": self.architecture, "norm": self.norm}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "TransformNet":
        """The network that `metadata` describes, with initial weights; other keys are ignored.

        Raises:
            DataError: a key is missing or names nothing this version knows.
        """
        try:
            return cls(metadata["architecture"], metadata["norm"])
        except KeyError as error:
            raise DataError(f"the model's metadata lacks {error.args[0]!r}; give a model that fastnst wrote") from error
        except UserError as error:
            raise DataError(f"the model's metadata: {error}") from error

    def forward(self, x: Tensor, *, raw: bool = False) -> Tensor:
        """Stylise.

        Args:
            x: `[N, 3, H, W]`, RGB, floating in [0, 1] or uint8, H and W ≥ 16. Bytes are brought into the first layer's
                type in one pass, and have no gradient.
            raw: give the last layer's output as it is, of which `painted` tells how it becomes the picture.

        Returns:
            `[N, 3, H, W]` on [0, 1]'s scale, fp32 or x's wider type, not clamped, channels_last; or the raw output.

        Raises:
            UserError: another shape, or a side below 16.
        """
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < SMALLEST_SIDE:
            raise UserError(
                f"the transform net takes pictures [N, 3, H, W] with sides of {SMALLEST_SIDE} pixels or more, "
                f"got {list(x.shape)}; enlarge the picture"
            )
        size = x.shape[2:]
        layers = [self.get_submodule(name) for name in LAYER_NAMES]
        x = self._entered(x)
        for layer, following in pairwise(layers):
            x = layer(x, following.wants)
        x = layers[-1](x)
        if raw:
            return x
        (top, left, height, width), tanh, factor, offset = self.painted(x.shape[2:], size)
        x = _at_least_fp32(x[:, :, top : top + height, left : left + width])
        x = x.contiguous(memory_format=torch.channels_last)
        x = factor * (x.tanh() if tanh else x)
        return x + offset if offset else x

    def _entered(self, x: Tensor) -> Tensor:
        """The pictures as the first layer wants them."""
        johnson = self.architecture == "johnson"
        border = 40 if self.architecture == "hwalsuklee" else max(self.conv1.wants(x).padding)
        if x.dtype == torch.uint8:
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.conv1.weight.dtype
            return uint8_to_input(x, 1.0 if johnson else 1.0 / 255.0, padding=border, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        return reflect_pad(x * 255.0 if johnson else x, border)

    def painted(self, size: Sequence[int], wanted: Sequence[int]) -> Painted:
        """How raw output of height and width `size` becomes the picture, which has height and width `wanted`."""
        rows, columns = self._inside(size, wanted)
        window = (rows.start, columns.start, wanted[0], wanted[1])
        match self.architecture:
            case "hwalsuklee":
                return Painted(window, True, 0.5, 0.5)
            case "lengstrom":
                return Painted(window, True, 150.0 / 255.0, 0.5)
            case _:
                return Painted(window, False, 1.0 / 255.0, 0.0)

    def _inside(self, size: Sequence[int], wanted: Sequence[int]) -> tuple[slice, slice]:
        """Where the picture lies in the output, which is larger because strided convolutions round odd sides up.

        TF "SAME" pads an odd side by one zero before it, an even side by none, and the transposed convolutions
        always take it for even: each odd side on the way moves the picture by as much as it adds. Reflection padding
        does not care.
        """
        if self.architecture == "johnson":
            return slice(0, wanted[0]), slice(0, wanted[1])
        return slice(size[0] - wanted[0], size[0]), slice(size[1] - wanted[1], size[1])

    def _initialise(self, generator: torch.Generator | None) -> None:
        for layer in self.modules():
            if not isinstance(layer, ConvLayer | UpLayer):
                continue
            weight = layer.weight
            receptive = weight.shape[2] * weight.shape[3]
            match self.architecture:
                case "hwalsuklee":
                    # TensorFlow takes dimension 2 of HWIO for the fan-in, which is the output of a transposed
                    # convolution: both are dimension 1 here. The 1.3 makes up for what truncation takes away.
                    _truncated_normal(weight, math.sqrt(1.3 * 2.0 / (weight.shape[1] * receptive)), generator)
                case "lengstrom":
                    _truncated_normal(weight, 0.1, generator)
                case _:
                    bound = 1.0 / math.sqrt(weight.shape[1] * receptive)
                    nn.init.uniform_(weight, -bound, bound, generator=generator)
                    if layer.bias is not None:
                        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


class _NormedLayer(nn.Module):
    """What follows a convolution: norm, residual and ReLU in one kernel, or a bias alone.

    In training the norm's result is not kept for the backward of the convolution that takes it: the norm's input gives
    it back (`fastnst_kernels.recomputed`).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, weight_shape: tuple[int, ...], channels: int, *, norm: str | None, eps: float, relu: bool
    ) -> None:
        super().__init__()
        self.norm, self.eps, self.relu = norm, eps, relu
        self.weight = nn.Parameter(torch.empty(weight_shape))
        self.bias = nn.Parameter(torch.zeros(channels)) if norm is None else None
        if norm is not None:
            self.scale = nn.Parameter(torch.ones(channels))
            self.shift = nn.Parameter(torch.zeros(channels))
        if norm == "batch":
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_var", torch.ones(channels))

    def normalise(self, x: Tensor, wants: _Wants, residual: Tensor | None = None) -> Tensor:
        """relu?(norm(x)·scale + shift + residual) as the next layer wants it; x itself where the layer has no norm."""
        if self.norm is None:
            return x
        options = {"eps": self.eps, "residual": residual, "relu": self.relu, **wants(x)._asdict()}
        if self.norm == "instance":
            normalise = recomputed_instance_norm if self.training else instance_norm
            return normalise(x, self.scale, self.shift, **options)
        running = (self.running_mean, self.running_var)
        if self.training:
            return recomputed_batch_norm(x, self.scale, self.shift, *running, **options)
        return batch_norm(x, self.scale, self.shift, *running, training=False, **options)


class ConvLayer(_NormedLayer):
    """Convolution, then norm and ReLU: `[N, in, H, W]` → `[N, out, H', W']`, H' = ⌈H / stride⌉ unless unpadded.

    The input comes as `wants` says, and the result goes as the next layer's `wants` says: borders are written by the
    norm before, in its own pass. Only zeros that are alike at both sides, which cost nothing, are the convolution's.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        *,
        padding: str,
        norm: str | None,
        eps: float,
        relu: bool = True,
    ) -> None:
        super().__init__((outputs, inputs, kernel, kernel), outputs, norm=norm, eps=eps, relu=relu)
        self.stride, self.padding = stride, padding

    def wants(self, x: Tensor) -> Placing:
        kernel = self.weight.shape[-1]
        if self.padding == "reflect":
            return Placing(padding=(kernel // 2,) * 4)
        if self.padding == "same" and self.stride > 1:
            top, bottom = _same_padding(x.shape[2], kernel, self.stride)
            left, right = _same_padding(x.shape[3], kernel, self.stride)
            return Placing(padding=(left, right, top, bottom), padding_mode="zeros")
        return Placing()

    def forward(self, x: Tensor, wants: _Wants = _as_it_is, residual: Tensor | None = None) -> Tensor:
        around = self.weight.shape[-1] // 2 if self.padding == "same" and self.stride == 1 else 0
        x = convolution(x, self.weight, self.bias, stride=self.stride, padding=around)
        return self.normalise(x, wants, residual)


class ResidualBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), where x counts as far as the result reaches: without the border that it was
    given for the first convolution, and, where the convolutions are unpadded, without 2 pixels at each side.
    """

    def __init__(self, channels: int, *, padding: str, norm: str, eps: float) -> None:
        super().__init__()
        self.conv1 = ConvLayer(channels, channels, 3, padding=padding, norm=norm, eps=eps)
        self.conv2 = ConvLayer(channels, channels, 3, padding=padding, norm=norm, eps=eps, relu=False)

    def wants(self, x: Tensor) -> Placing:
        return self.conv1.wants(x)

    def forward(self, x: Tensor, wants: _Wants = _as_it_is) -> Tensor:
        out: Tensor = self.conv2(self.conv1(x, self.conv2.wants), wants, x)
        return out


class UpLayer(_NormedLayer):
    """×2 upsampling, 3×3, then norm and ReLU: `[N, in, H, W]` → `[N, out, 2H, 2W]`.

    `nearest=False`: transposed convolution as TF "SAME" cuts it, weight `[in, out, 3, 3]`.
    `nearest=True`: nearest-neighbour ×2, reflected by 1, convolved, weight `[out, in, 3, 3]`. On a GPU the norm before
    writes the enlarged, reflected picture. On a CPU a multiplication costs more than memory: a pixel repeated twice and
    convolved with w is one pixel transposed-convolved at stride 2 with the 4×4 kernel w ⊛ 1₂ₓ₂, the same sums in 16
    instead of 36 multiplications per input pixel and channel. Reflecting the enlarged picture by one repeats the border
    pixel of the small one, which is what it wants there.
    """

    def __init__(self, inputs: int, outputs: int, *, nearest: bool, norm: str, eps: float) -> None:
        shape = (outputs, inputs, 3, 3) if nearest else (inputs, outputs, 3, 3)
        super().__init__(shape, outputs, norm=norm, eps=eps, relu=True)
        self.nearest = nearest

    def wants(self, x: Tensor) -> Placing:
        if not self.nearest:
            return Placing()
        if _enlarges_in_norm(x):
            return Placing(upsample=2, padding=(1, 1, 1, 1))
        return Placing(padding=(1, 1, 1, 1), padding_mode="symmetric")

    def forward(self, x: Tensor, wants: _Wants = _as_it_is) -> Tensor:
        if not self.nearest:
            x = convolution(x, self.weight, stride=2, transposed=True)[:, :, :-1, :-1]
            x = x.contiguous(memory_format=torch.channels_last)
        elif _enlarges_in_norm(x):
            x = convolution(x, self.weight)
        else:
            x = convolution(x, _doubling_kernel(self.weight), stride=2, padding=3, transposed=True)
        return self.normalise(x, wants)


def _enlarges_in_norm(x: Tensor) -> bool:
    return x.is_cuda


def _doubling_kernel(weight: Tensor) -> Tensor:
    """Conv weight `[out, in, 3, 3]` → the transposed-conv weight `[in, out, 4, 4]` that doubles, then convolves."""
    # A convolution correlates, a transposed one convolves: hence the flip. Along each direction the two copies of a
    # pixel add the kernel to itself, one step apart.
    kernel = weight.transpose(0, 1).flip(2, 3)
    kernel = F.pad(kernel, (0, 1)) + F.pad(kernel, (1, 0))
    kernel = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))
    return kernel.contiguous(memory_format=torch.channels_last)


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after a side as TensorFlow's "SAME" has them: the odd one comes after."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _truncated_normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
