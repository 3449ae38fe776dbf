"""Adjoints of the linear maps in networks: ⟨A x, y⟩ = ⟨x, Aᵀ y⟩.

Where A copies a value to several places, Aᵀ sums over them; where A drops a value, Aᵀ gives it zero. Nothing here needs
autograd, so all of it works in inference mode. The adjoint of the norms' upsampling and padding is the kernel library's
`upsample_pad_adjoint`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst_kernels.norm.upsample_pad import UpsamplePad, upsample_pad_adjoint


def conv2d_adjoint(y: Tensor, weight: Tensor, size: tuple[int, int], *, stride: int = 1, padding: int = 0) -> Tensor:
    """Apply the adjoint of `conv2d(x, weight, stride=stride, padding=padding)`: the transposed filters.

    Args:
        y: `[N, out, H', W']`, of the convolution's output size.
        weight: `[out, in, k, k]`.
        size: H and W of x. With a stride above 1 several sizes of x give the same size of y; rows and columns that no
            filter reached get zeros.
        stride: of the convolution.
        padding: zeros at each side of x.

    Returns:
        `[N, in, H, W]`.
    """
    kernel = weight.shape[-1]
    unreached = [
        wanted - ((given - 1) * stride + kernel - 2 * padding) for wanted, given in zip(size, y.shape[2:], strict=True)
    ]
    return F.conv_transpose2d(y, weight, stride=stride, padding=padding, output_padding=unreached)


def doubling_conv_transpose2d_adjoint(y: Tensor, weight: Tensor) -> Tensor:
    """Apply the adjoint of TF "SAME" upsampling: `conv_transpose2d(x, weight, stride=2)[:, :, :-1, :-1]`.

    Args:
        y: `[N, out, 2H, 2W]`.
        weight: `[in, out, 3, 3]`.

    Returns:
        `[N, in, H, W]`.
    """
    return F.conv2d(F.pad(y, (0, 1, 0, 1)), weight, stride=2)


def crop_adjoint(y: Tensor, size: tuple[int, int], inside: tuple[slice, slice]) -> Tensor:
    """Apply the adjoint of `x[:, :, *inside]` for x of height and width `size`: zeros around y."""
    x = y.new_zeros(*y.shape[:2], *size).contiguous(memory_format=torch.channels_last)
    x[:, :, *inside] = y
    return x


def reflect_pad_adjoint(y: Tensor, pad: int) -> Tensor:
    """Apply the adjoint of `fastnst.models.padding.reflect_pad`, repeated reflections included.

    Args:
        y: `[N, C, H + 2·pad, W + 2·pad]`, H and W at least 2.
        pad: the border in pixels.

    Returns:
        `[N, C, H, W]`: each pixel the sum over all its mirror images.
    """
    for dim in (2, 3):
        for step in reversed(_reflections(y.shape[dim] - 2 * pad, pad)):
            border = (0, 0, step, step) if dim == 2 else (step, step, 0, 0)
            y = upsample_pad_adjoint(y, UpsamplePad(1, border, "reflect"))
    return y


def _reflections(side: int, pad: int) -> list[int]:
    """Split `pad` into single reflections, none wider than its input allows."""
    steps = []
    while pad > 0:
        steps.append(min(pad, side - 1))
        side += 2 * steps[-1]
        pad -= steps[-1]
    return steps
