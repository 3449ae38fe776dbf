"""The choice of an op's implementation, memory layouts, and the checks that every op shares.

Each op exists twice: in PyTorch (any device) and as Triton kernels (CUDA, or CPU tensors in Triton's interpreter).
The environment variable `FASTNST_KERNELS` chooses, read at every call:

| value | meaning |
|---|---|
| `auto` (default) | Triton for CUDA tensors, and for CPU tensors under `TRITON_INTERPRET=1`; else the reference |
| `reference` | always the reference |
| `triton` | always Triton; an error where it cannot run |

Kernels see a 4-D tensor as a contiguous `[P, R, Q]`: channels_last is `P=N, R=H·W, Q=C`, contiguous is `P=N·C, R=H·W,
Q=1`. Both flatten (sample, channel) to the index `p·Q + q = n·C + c`, so one kernel serves both memory formats.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists for Linux only; the references run everywhere
    triton = None
    tl = None

Implementation = Literal["reference", "triton"]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REFERENCE_DTYPES = (*KERNEL_DTYPES, torch.float64)

# Triton chooses between compiler and interpreter when a kernel is defined, so this cannot change afterwards.
# The interpreter's `tl.dot` multiplies the bit patterns of bf16 (3.7.1), so kernels widen its operands first: exact.
INTERPRETING: bool = triton is not None and bool(triton.knobs.runtime.interpret)

# Programs per launch, enough to fill the largest GPU a few times. A constant rather than a multiple of the device's
# multiprocessors, so that sums are split, and therefore rounded, the same way on every GPU.
TARGET_PROGRAMS = 512


def jit(fn: Callable[..., Any]) -> Any:
    """`triton.jit`, or the bare function if Triton is missing and the kernel will never be launched."""
    return fn if triton is None else triton.jit(fn)


def launches_on_its_device(fn: Callable[Concatenate[Tensor, Arguments], Result]) -> Callable[..., Result]:
    """Make the device of `fn`'s first argument current: Triton launches on the current device."""

    @wraps(fn)
    def launcher(x: Tensor, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.cuda.device_of(x):  # changes nothing for a tensor on the CPU
            return fn(x, *args, **kwargs)

    return launcher


def implementation(tensor: Tensor) -> Implementation:
    """The implementation that an op runs for `tensor`.

    Raises:
        ValueError: `FASTNST_KERNELS` is not a known value, or asks for Triton where it cannot run.
    """
    choice = os.environ.get("FASTNST_KERNELS", "auto")
    if choice not in ("auto", "reference", "triton"):
        raise ValueError(f"FASTNST_KERNELS={choice!r} is unknown: use 'auto', 'triton' or 'reference'")
    if choice == "reference":
        return "reference"
    unsupported = _unsupported_reason(tensor)
    if unsupported is None:
        return "triton"
    if choice == "triton":
        raise ValueError(f"FASTNST_KERNELS=triton, but {unsupported}: use FASTNST_KERNELS=auto")
    return "reference"


def _unsupported_reason(tensor: Tensor) -> str | None:
    """Why the Triton kernels cannot take `tensor`, or None."""
    if triton is None:
        return "Triton is not installed"
    if tensor.dtype not in KERNEL_DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {tensor.dtype}"
    if tensor.device.type == "cpu":
        return None if INTERPRETING else "the tensor is on the CPU and TRITON_INTERPRET=1 was not set at import"
    if tensor.device.type != "cuda":
        return f"the kernels do not run on {tensor.device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = _compute_capability(tensor.device.index or 0)
    return None if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]} is below 8.0"


@dataclass(frozen=True)
class Chip:
    """The properties of a GPU that kernels use."""

    multiprocessors: int
    capability: tuple[int, int]
    l2_bytes: int = 40 * 2**20


def chip(tensor: Tensor) -> Chip | None:
    """The GPU that holds `tensor`; None for the CPU."""
    return _chip(tensor.device.index or 0) if tensor.device.type == "cuda" else None


@cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    return Chip(properties.multi_processor_count, _compute_capability(index), properties.L2_cache_size)


@cache
def _compute_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def allocate(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised contiguous memory on `like`'s device.

    Every kernel gets its outputs and scratch space here, so that the tests can fill them with NaN first.
    """
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)


def allocate_like(x: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory of `x`'s memory format; `shape` is `[N, C, H, W]`, `x`'s own by default."""
    n, c, h, w = x.shape if shape is None else shape
    if memory_format_of(x) == torch.channels_last:
        return allocate((n, h, w, c), x, dtype).permute(0, 3, 1, 2)
    return allocate((n, c, h, w), x, dtype)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The dense format in which an op processes `x` and returns its result: PyTorch's rule, the order of the strides.

    The strides of sides of 1 and of expanded sides say nothing. Where no other is left, as for `[N, C, 1, 1]`, one
    memory has both formats, and the strides still tell the one that it came from.
    """
    c, h, w = x.shape[1:]
    strides = [x.stride(d) for d, side in ((2, h), (3, w)) if side > 1 and x.stride(d) > 0]
    if c == 1 or not strides:
        last = x.stride(3) >= c * x.stride(1) > 0
    else:
        last = min(strides) > x.stride(1) > 0
    return torch.channels_last if last else torch.contiguous_format


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """`x` in the memory format of `like` (itself by default); no copy if it has it already."""
    return x.contiguous(memory_format=memory_format_of(x if like is None else like))


def laid_out_like(result: Tensor, x: Tensor) -> Tensor:
    """`result` with the strides of `allocate_like(x)`; no copy if it has them already."""
    c, h, w = result.shape[1:]
    is_last = memory_format_of(x) == torch.channels_last
    strides = (h * w * c, 1, w * c, c) if is_last else (c * h * w, h * w, w, 1)
    return result if result.stride() == strides else allocate_like(x, dtype=result.dtype).copy_(result)


def as_prq(x: Tensor) -> tuple[int, int, int]:
    """`(P, R, Q)` of a dense `[N, C, H, W]` tensor: see the module's docstring."""
    n, c, h, w = x.shape
    return (n, h * w, c) if memory_format_of(x) == torch.channels_last else (n * c, h * w, 1)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float32 for the dtypes of the kernels; float64 for float64 (gradcheck)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n` ≥ 1."""
    return 1 << (n - 1).bit_length()


def check_tensor(name: str, x: object, *, tangent: bool = False) -> None:
    """Raise ValueError unless `x` is a dense tensor, and unless `tangent` one without a forward-mode tangent.

    PyTorch drops the tangents of custom ops' arguments without a word: the derivative would be 0.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is {'None' if x is None else f'of type {type(x).__name__}'}, expected a torch.Tensor")
    if x.is_nested or x.layout != torch.strided:
        layout = "nested" if x.is_nested else x.layout
        raise ValueError(f"{name} is {layout}, expected a dense tensor (torch.strided): see Tensor.to_dense")
    if not tangent and has_tangent(x):
        raise ValueError(
            f"{name} has a forward-mode tangent, which this op would drop: use backward mode, or the op's "
            "*_reference, which PyTorch differentiates in any mode"
        )


def has_tangent(x: Tensor) -> bool:
    """Whether `x` has a tangent of forward-mode automatic differentiation; False while torch.compile traces."""
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None


def check_number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise ValueError unless `value` is a finite number from `low` to `high`."""
    if not _is_number(value) or not -math.inf < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number")
    if not low <= value <= high:
        allowed = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        raise ValueError(f"{name} is {value}, expected {allowed}")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real | torch.SymFloat)


def is_integer(value: object) -> bool:
    """Whether `value` is a whole number by type, which 2.0 and True are not."""
    return isinstance(value, (numbers.Integral, torch.SymInt)) and not isinstance(value, bool)


def check_images(name: str, x: object, *, tangent: bool = False) -> None:
    """Raise ValueError unless `x` is a non-empty floating `[N, C, H, W]`; `tangent` as for `check_tensor`."""
    check_tensor(name, x, tangent=tangent)
    assert isinstance(x, Tensor)
    if x.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected 4 dimensions [N, C, H, W]")
    if x.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: it holds no elements")
    if x.dtype not in REFERENCE_DTYPES:
        raise ValueError(f"{name} is {x.dtype}, expected float32, float16, bfloat16 or float64")


def check_per_channel(name: str, value: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `value` is `[C]`, floating, on the device of `x [N, C, H, W]`."""
    check_tensor(name, value)
    if tuple(value.shape) != (x.shape[1],):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected ({x.shape[1]},): x is {tuple(x.shape)}")
    _check_floating(name, value, x)


def _check_floating(name: str, value: Tensor, x: Tensor) -> None:
    if value.dtype not in REFERENCE_DTYPES:
        raise ValueError(f"{name} is {value.dtype}, expected a floating type such as {x.dtype} or torch.float32")
    check_same_device(name, value, "x", x)


def check_residual(residual: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless `residual` is floating, on `x`'s device and of its shape, plus a margin."""
    if residual is None:
        return
    check_tensor("residual", residual)
    if residual.dim() != 4 or residual.shape[:2] != x.shape[:2] or not _surrounds(residual.shape[2:], x.shape[2:]):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, expected x's {tuple(x.shape)}, "
            "or height and width larger by the same even number, for a margin that is cropped"
        )
    _check_floating("residual", residual, x)


def _surrounds(outer: Sequence[int], inner: Sequence[int]) -> bool:
    rows, columns = outer[0] - inner[0], outer[1] - inner[1]
    return rows == columns and rows >= 0 and rows % 2 == 0


def check_same_device(name: str, a: Tensor, other_name: str, b: Tensor) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if a.device != b.device:
        raise ValueError(f"{name} is on {a.device}, {other_name} on {b.device}: move both to one device")
