"""The transform net (Johnson, Alahi, Fei-Fei 2016), in every shape that `ARCHITECTURES` lists.

All have 9×9 conv → 32, two 3×3 stride-2 convs → 64 → 128, five residual blocks of two 3×3 convs, two ×2 upsampling
convs → 64 → 32, 9×9 conv → 3, with norm and ReLU after each; a residual block ends with its addition, without a ReLU.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnst.errors import DataError, UserError
from fastnst.models.architectures import ARCHITECTURES
from fastnst.models.padding import reflect_pad
from fastnst_kernels import batch_norm, instance_norm, uint8_to_input
from fastnst_kernels.conv.convolution import convolution
from fastnst_kernels.norm.recompute import recomputed_batch_norm, recomputed_instance_norm

NORMS = ("instance", "batch")
LAYER_NAMES = ("conv1", "conv2", "conv3", "res1", "res2", "res3", "res4", "res5", "up1", "up2", "out")
SMALLEST_SIDE = 16


class InputLayout(NamedTuple):
    """Upsampling and padding of a layer's input; the norm before the layer writes them with its result."""

    upsample: int = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    padding_mode: str = "reflect"


class OutputMapping(NamedTuple):
    """How the last layer's pre-activation becomes the image: factor·tanh?(crop) + offset."""

    window: tuple[int, int, int, int]
    """Top, left, height and width of the crop, in pixels."""
    tanh: bool
    factor: float
    offset: float


_LayoutOf = Callable[[Tensor], InputLayout]


def _plain_layout(x: Tensor) -> InputLayout:  # noqa: ARG001
    return InputLayout()


class TransformNet(nn.Module):
    """Turns an image into a stylized image.

    Parameters are named `conv1.weight`, `conv1.scale`, `conv1.shift`, `res1.conv1.weight`, …, `out.weight`. A
    convolution followed by a norm has no bias, which the norm would cancel; without a norm, `out.bias` replaces scale
    and shift. Weights are `[out, in, k, k]`, those of transposed convolutions `[in, out, k, k]`. Running statistics of
    batch norm are buffers.

    Args:
        architecture: a key of `ARCHITECTURES`.
        norm: `instance` (statistics per image) or `batch`.
        generator: source of the initial weights; None: PyTorch's global one.

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
        self.spec = spec = ARCHITECTURES[architecture]
        width, nearest = spec.base_width, spec.upsampling == "nearest"

        def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> ConvLayer:
            return ConvLayer(inputs, outputs, kernel, stride, padding=spec.padding, norm=norm, eps=spec.eps)

        self.conv1 = conv(3, width, 9)
        self.conv2 = conv(width, 2 * width, 3, 2)
        self.conv3 = conv(2 * width, 4 * width, 3, 2)
        for index in range(1, 6):
            block = ResidualBlock(4 * width, padding=spec.block_padding, norm=norm, eps=spec.eps)
            self.add_module(f"res{index}", block)
        self.up1 = UpLayer(4 * width, 2 * width, nearest=nearest, norm=norm, eps=spec.eps)
        self.up2 = UpLayer(2 * width, width, nearest=nearest, norm=norm, eps=spec.eps)
        last_norm = norm if spec.norm_on_output else None
        self.out = ConvLayer(width, 3, 9, padding=spec.padding, norm=last_norm, eps=spec.eps, relu=False)
        self._initialise(generator)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def metadata(self) -> dict[str, str]:
        """The arguments of `from_metadata`, as strings."""
        return {"architecture": self.architecture, "norm": self.norm}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "TransformNet":
        """Build the network of `metadata`, with initial weights; DataError for a missing key or unknown value."""
        try:
            return cls(metadata["architecture"], metadata["norm"])
        except KeyError as error:
            raise DataError(f"the model's metadata lacks {error.args[0]!r}; give a model that fastnst wrote") from error
        except UserError as error:
            raise DataError(f"the model's metadata: {error}") from error

    def forward(self, x: Tensor, *, pre_activation: bool = False) -> Tensor:
        """Stylize images.

        Args:
            x: `[N, 3, H, W]`, RGB, floating in [0, 1] or uint8, H and W ≥ 16. Bytes are cast to the first layer's type
                in one pass, and have no gradient.
            pre_activation: return the last layer's output itself, before `output_mapping`.

        Returns:
            `[N, 3, H, W]` on [0, 1]'s scale, fp32 or x's wider type, not clamped, channels_last; or the pre-activation.

        Raises:
            UserError: another shape, or a side below 16.
        """
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < SMALLEST_SIDE:
            raise UserError(
                f"the transform net takes images [N, 3, H, W] with sides of {SMALLEST_SIDE} pixels or more, "
                f"got {list(x.shape)}; enlarge the image"
            )
        size = x.shape[2:]
        layers = [self.get_submodule(name) for name in LAYER_NAMES]
        x = self._preprocess(x)
        for layer, following in pairwise(layers):
            x = layer(x, following.input_layout)
        x = layers[-1](x)
        if pre_activation:
            return x
        (top, left, height, width), tanh, factor, offset = self.output_mapping(x.shape[2:], size)
        x = at_least_fp32(x[:, :, top : top + height, left : left + width])
        x = x.contiguous(memory_format=torch.channels_last)
        x = factor * (x.tanh() if tanh else x)
        return x + offset if offset else x

    def _preprocess(self, x: Tensor) -> Tensor:
        """Scale, cast and pad the images for the first layer."""
        scale = self.spec.input_scale
        border = self.spec.border + max(self.conv1.input_layout(x).padding)
        if x.dtype == torch.uint8:
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.conv1.weight.dtype
            return uint8_to_input(x, scale / 255.0, padding=border, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        return reflect_pad(x if scale == 1.0 else x * scale, border)

    def output_mapping(self, size: Sequence[int], image_size: Sequence[int]) -> OutputMapping:
        """Map a pre-activation of height and width `size` to an image of height and width `image_size`."""
        rows, columns = self.output_slices(size, image_size)
        window = (rows.start, columns.start, image_size[0], image_size[1])
        return OutputMapping(window, self.spec.tanh, self.spec.factor, self.spec.offset)

    def output_slices(self, size: Sequence[int], image_size: Sequence[int]) -> tuple[slice, slice]:
        """Rows and columns of the image in the pre-activation, which is larger: strided layers round odd sides up.

        TF "SAME" pads an odd side by one zero before it, an even side by none, and the transposed convolutions take
        every side for even: each odd side on the way moves the image by as much as it adds. Reflection moves nothing.
        """
        if self.spec.padding == "reflect":
            return slice(0, image_size[0]), slice(0, image_size[1])
        return slice(size[0] - image_size[0], size[0]), slice(size[1] - image_size[1], size[1])

    def _initialise(self, generator: torch.Generator | None) -> None:
        for layer in self.modules():
            if not isinstance(layer, ConvLayer | UpLayer):
                continue
            # PyTorch's fan-in of every weight. TensorFlow takes dimension 2 of HWIO, the output of a transposed
            # convolution: dimension 1 here, too.
            scale = self.spec.init_scale(layer.weight[0].numel())
            if self.spec.init == "truncated_normal":
                nn.init.trunc_normal_(layer.weight, std=scale, a=-2 * scale, b=2 * scale, generator=generator)
                continue
            for parameter in (layer.weight, layer.bias):
                if parameter is not None:
                    nn.init.uniform_(parameter, -scale, scale, generator=generator)


class _NormedLayer(nn.Module):
    """A convolution's weight, then norm, residual and ReLU in one kernel, or a bias alone.

    In training, the backward of the next convolution computes the norm's result again from the norm's input instead of
    keeping it (`fastnst_kernels.norm.recompute`).
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

    def normalise(self, x: Tensor, next_layout: _LayoutOf, residual: Tensor | None = None) -> Tensor:
        """relu?(norm(x)·scale + shift + residual), laid out for the next layer; x itself without a norm."""
        if self.norm is None:
            return x
        options = {"eps": self.eps, "residual": residual, "relu": self.relu, **next_layout(x)._asdict()}
        if self.norm == "instance":
            normalise = recomputed_instance_norm if self.training else instance_norm
            return normalise(x, self.scale, self.shift, **options)
        running = (self.running_mean, self.running_var)
        if self.training:
            return recomputed_batch_norm(x, self.scale, self.shift, *running, **options)
        return batch_norm(x, self.scale, self.shift, *running, training=False, **options)


class ConvLayer(_NormedLayer):
    """Convolution, then norm and ReLU: `[N, in, H, W]` → `[N, out, H', W']`, H' = ⌈H / stride⌉ unless unpadded.

    The input has this layer's `input_layout`, the result that of the next: the norm before writes borders in its own
    pass. Only the convolution itself pads with equal zeros at both sides, which cost nothing.
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

    def input_layout(self, x: Tensor) -> InputLayout:
        kernel = self.weight.shape[-1]
        if self.padding == "reflect":
            return InputLayout(padding=(kernel // 2,) * 4)
        if self.padding == "same" and self.stride > 1:
            top, bottom = _same_padding(x.shape[2], kernel, self.stride)
            left, right = _same_padding(x.shape[3], kernel, self.stride)
            return InputLayout(padding=(left, right, top, bottom), padding_mode="zeros")
        return InputLayout()

    @property
    def zero_padding(self) -> int:
        """Zeros that the convolution itself adds at each side."""
        return self.weight.shape[-1] // 2 if self.padding == "same" and self.stride == 1 else 0

    def forward(self, x: Tensor, next_layout: _LayoutOf = _plain_layout, residual: Tensor | None = None) -> Tensor:
        x = convolution(x, self.weight, self.bias, stride=self.stride, padding=self.zero_padding)
        return self.normalise(x, next_layout, residual)


class ResidualBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), with x cropped to the size of the result.

    The crop removes the border for the first convolution and, where convolutions are unpadded, 2 pixels at each side.
    """

    def __init__(self, channels: int, *, padding: str, norm: str, eps: float) -> None:
        super().__init__()
        self.conv1 = ConvLayer(channels, channels, 3, padding=padding, norm=norm, eps=eps)
        self.conv2 = ConvLayer(channels, channels, 3, padding=padding, norm=norm, eps=eps, relu=False)

    def input_layout(self, x: Tensor) -> InputLayout:
        return self.conv1.input_layout(x)

    def forward(self, x: Tensor, next_layout: _LayoutOf = _plain_layout) -> Tensor:
        out: Tensor = self.conv2(self.conv1(x, self.conv2.input_layout), next_layout, x)
        return out


class UpLayer(_NormedLayer):
    """×2 upsampling, 3×3, then norm and ReLU: `[N, in, H, W]` → `[N, out, 2H, 2W]`.

    `nearest=False`: transposed convolution cropped as by TF "SAME", weight `[in, out, 3, 3]`.
    `nearest=True`: nearest-neighbour ×2, reflected by 1, convolved, weight `[out, in, 3, 3]`. On a GPU the norm before
    writes the enlarged, reflected image. On a CPU multiplications cost more than memory: a pixel repeated twice and
    convolved with w is one pixel transposed-convolved at stride 2 with the 4×4 kernel w ⊛ 1₂ₓ₂, the same sums in 16
    instead of 36 multiplications per input pixel and channel. Reflecting the enlarged image by one repeats the border
    pixel of the small one: symmetric padding.
    """

    def __init__(self, inputs: int, outputs: int, *, nearest: bool, norm: str, eps: float) -> None:
        shape = (outputs, inputs, 3, 3) if nearest else (inputs, outputs, 3, 3)
        super().__init__(shape, outputs, norm=norm, eps=eps, relu=True)
        self.nearest = nearest

    def input_layout(self, x: Tensor) -> InputLayout:
        if not self.nearest:
            return InputLayout()
        if _upsamples_in_norm(x):
            return InputLayout(upsample=2, padding=(1, 1, 1, 1))
        return InputLayout(padding=(1, 1, 1, 1), padding_mode="symmetric")

    def forward(self, x: Tensor, next_layout: _LayoutOf = _plain_layout) -> Tensor:
        return self.normalise(self.convolve(x), next_layout)

    def convolve(self, x: Tensor) -> Tensor:
        """The norm's input, `[N, out, 2H, 2W]`, from x in `input_layout`."""
        if not self.nearest:
            x = convolution(x, self.weight, stride=2, transposed=True)[:, :, :-1, :-1]
            return x.contiguous(memory_format=torch.channels_last)
        if _upsamples_in_norm(x):
            return convolution(x, self.weight)
        return convolution(x, _doubling_kernel(self.weight), stride=2, padding=3, transposed=True)


def _upsamples_in_norm(x: Tensor) -> bool:
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


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or in its wider type."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
