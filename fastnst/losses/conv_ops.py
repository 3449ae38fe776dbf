"""Convolution, ReLU and pooling for the fused loss, in as few library calls as each device has."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst_kernels import max_pool2d_switches, max_unpool2d_switches
from fastnst_kernels.cpu import winograd


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W ∗ x + b with 3×3 kernels and zero padding, without autograd; arguments as in `convolve_relu`."""
    if winograd.is_faster(x, weight):
        return winograd.convolve(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=1)


def convolve_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """max(W ∗ x + b, 0) with 3×3 kernels and zero padding, without autograd. The first row that applies:

    | device | condition                                          | call                     | NaN            |
    |--------|----------------------------------------------------|--------------------------|----------------|
    | CPU    | Winograd is faster                                 | Winograd, ReLU within    | propagates     |
    | GPU    | fp32 or bf16, unless deterministic algorithms are on | cuDNN's fused call     | may become 0   |
    | CPU    | fp32, or bf16 with instructions for it             | oneDNN's fused call      | may become 0   |
    | any    | otherwise; fp16 may overflow                       | convolution, then ReLU   | propagates     |

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
    """Input gradient Wᵀ ∗ gradient of a convolution: `[N, K, H, W]` → `[N, C, H, W]`."""
    if winograd.is_faster(gradient, weight):
        return winograd.input_gradient(gradient, weight)
    return F.conv_transpose2d(gradient, weight, padding=1)


def relu_backward_(gradient: Tensor, output: Tensor) -> Tensor:
    """[y > 0]·∂L/∂y in place, y the ReLU's `output`; as in PyTorch, a NaN in y passes the gradient."""
    torch.ops.aten.threshold_backward.grad_input(gradient, output, 0, grad_input=gradient)
    return gradient


def pool(x: Tensor, *, switches: bool) -> tuple[Tensor, Tensor | None]:
    """Max-pool `x [N, C, H, W]` 2×2; with `switches`, also return the positions of the maxima for `unpool`."""
    if x.is_cuda:
        maxima, positions = max_pool2d_switches(x)
        return maxima, positions if switches else None
    if not switches:
        return F.max_pool2d(x, 2), None
    # On a CPU PyTorch's 64-bit indices are much faster than switches; 32 bits hold them.
    maxima, indices = F.max_pool2d(x, 2, return_indices=True)
    return maxima, indices.to(torch.int32)


def unpool(gradient: Tensor, switches: Tensor, size: tuple[int, int]) -> Tensor:
    """Backward of the pooling: Sᵀ·gradient, `[N, C, *size]`."""
    if switches.dtype == torch.uint8:
        return max_unpool2d_switches(gradient, switches, size)
    result = torch.empty(
        (*gradient.shape[:2], *size), dtype=gradient.dtype, device=gradient.device, memory_format=torch.channels_last
    )
    # It reads only shape and format of the pooled tensor, and the result has the same.
    torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
        gradient, result, [2, 2], [2, 2], [0, 0], [1, 1], False, switches.to(torch.int64), grad_input=result
    )
    return result


def _fuses_on_cuda(dtype: torch.dtype) -> bool:
    cudnn = torch.backends.cudnn
    if not (cudnn.is_available() and cudnn.enabled) or torch.are_deterministic_algorithms_enabled():
        return False
    return dtype in (torch.float32, torch.bfloat16)


def _fuses_on_cpu(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
