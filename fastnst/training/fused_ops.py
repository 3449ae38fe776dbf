"""What the loss network's hand-written passes are made of, in as few calls as the libraries offer for each device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst_kernels import max_pool2d_switches, max_unpool2d_switches
from fastnst_kernels.cpu import winograd


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W ∗ x + b with 3×3 kernels and a border of zeros, without a gradient; arguments as in `convolve_relu`."""
    if winograd.is_faster(x, weight):
        return winograd.convolve(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=1)


def convolve_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """max(W ∗ x + b, 0) with 3×3 kernels and a border of zeros, without a gradient.

    On a CPU Winograd's algorithm comes first where it pays, and hands NaN on. cuDNN and oneDNN have one call for it,
    which may turn NaN into 0. fp16, whose range convolutions may leave, takes PyTorch's ReLU, which hands NaN on; so do
    deterministic runs on a GPU, since cuDNN is not asked for a deterministic algorithm in that call.

    Args:
        x: `[N, C, H, W]`, channels_last.
        weight: `[K, C, 3, 3]` of x's type, channels_last.
        bias: `[K]` of x's type.
    """
    if winograd.is_faster(x, weight):
        return winograd.convolve(x, weight, bias, relu=True)
    ones = (1, 1)
    if x.is_cuda and _fuses_on_cuda(x.dtype):
        return torch.cudnn_convolution_relu(x, weight, bias, ones, ones, ones, 1)
    if x.device.type == "cpu" and _fuses_on_cpu(x.dtype):
        fused: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, ones, ones, ones, 1, "relu", [], "")
        return fused
    return F.relu_(F.conv2d(x, weight, bias, padding=1))


def convolve_backward(gradient: Tensor, weight: Tensor) -> Tensor:
    """Wᵀ ∗ gradient: of `[N, K, H, W]` and the weight of a convolution, `[N, C, H, W]`."""
    if winograd.is_faster(gradient, weight):
        return winograd.input_gradient(gradient, weight)
    return F.conv_transpose2d(gradient, weight, padding=1)


def relu_backward_(gradient: Tensor, output: Tensor) -> Tensor:
    """[y > 0]·∂L/∂y in place, y the ReLU's `output`; like PyTorch's, a NaN in y lets the gradient through."""
    return torch.ops.aten.threshold_backward.grad_input(gradient, output, 0, grad_input=gradient)


def pool(x: Tensor, *, switches: bool) -> tuple[Tensor, Tensor | None]:
    """2×2 maxima of `x [N, C, H, W]` and, if asked for, where they lay, for `unpool` alone to read."""
    if x.is_cuda:
        maxima, places = max_pool2d_switches(x)
        return maxima, places if switches else None
    if not switches:
        return F.max_pool2d(x, 2), None
    # On a CPU PyTorch's 64-bit indices take a fraction of the time of switches. Half as many bits hold them.
    maxima, indices = F.max_pool2d(x, 2, return_indices=True)
    return maxima, indices.to(torch.int32)


def unpool(gradient: Tensor, switches: Tensor, size: tuple[int, int]) -> Tensor:
    """Sᵀ·gradient, `[N, C, *size]`: the pooling's backward."""
    if switches.dtype == torch.uint8:
        return max_unpool2d_switches(gradient, switches, size)
    result = torch.empty(
        (*gradient.shape[:2], *size), dtype=gradient.dtype, device=gradient.device, memory_format=torch.channels_last
    )
    # Of what was pooled it reads the shape and the format, which the result has too.
    return torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
        gradient, result, [2, 2], [2, 2], [0, 0], [1, 1], False, switches.to(torch.int64), grad_input=result
    )


def _fuses_on_cuda(dtype: torch.dtype) -> bool:
    cudnn = torch.backends.cudnn
    if not (cudnn.is_available() and cudnn.enabled) or torch.are_deterministic_algorithms_enabled():
        return False
    return dtype in (torch.float32, torch.bfloat16)


def _fuses_on_cpu(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
