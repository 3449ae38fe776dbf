"""Inputs and decorators of the kernel tests: dtypes, layouts, seeded tensors, gradients, settings."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings

from fastnst_kernels import runtime

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _sliced(x: torch.Tensor) -> torch.Tensor:
    """Same values in a window of a larger contiguous tensor, every second row of it."""
    n, c, h, w = x.shape
    larger = x.new_full((n, c + 1, 2 * h, w + 2), 0 if x.dtype == torch.uint8 else float("nan"))
    larger[:, 1:, ::2, 1:-1] = x
    return larger[:, 1:, ::2, 1:-1]


def _channels_of_channels_last(x: torch.Tensor) -> torch.Tensor:
    """Same values in some of the channels of a wider channels_last tensor."""
    n, c, h, w = x.shape
    larger = _channels_last(x.new_full((n, c + 3, h, w), 0 if x.dtype == torch.uint8 else float("nan")))
    larger[:, 2:-1] = x
    return larger[:, 2:-1]


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": _channels_last,
    "sliced": _sliced,
    "sliced_channels_last": _channels_of_channels_last,
}


def with_dtypes(cases: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Each case with one dtype, in turn; the first with every dtype."""
    return [(*cases[0], dtype) for dtype in DTYPES] + [(*case, DTYPES[i % 3]) for i, case in enumerate(cases) if i]


def randn(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> torch.Tensor:
    """Normal values, the same on every device, rounded to `dtype`."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def whole_numbers(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, seed: int, most: int = 3
) -> torch.Tensor:
    """Whole numbers from -most to most: exact in any dtype, and so are their products and sums in fp32."""
    return torch.randint(-most, most + 1, tuple(shape), generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def parameters(channels: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 weight (some negative) and bias `[C]`, exact in bfloat16, for PyTorch in any dtype."""
    weight, bias = (randn((channels,), torch.bfloat16, device, seed=seed).float() for seed in (11, 12))
    return weight, bias


def gradients(
    fn: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], dy: torch.Tensor, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """`fn(*inputs)` and the gradients of `Σ fn·dy` for every input, all cast to `dtype` if given."""
    leaves = [t.detach() if dtype is None else t.detach().to(dtype) for t in inputs]
    y = fn(*[leaf.requires_grad_() for leaf in leaves])
    return y.detach(), torch.autograd.grad(y, leaves, dy.to(y.dtype))


def spread_like(x: torch.Tensor) -> torch.Tensor:
    """An expanded gradient: one value per sample and column, stride 0 elsewhere."""
    n, _, _, w = x.shape
    return randn((n, 1, 1, w), x.dtype, x.device, seed=21).expand(x.shape)


def switches_of_torch(x, kernel_size, stride):
    """The definition of the switches: PyTorch's plane index, as row and column from the window's corner."""
    y, index = F.max_pool2d(x, kernel_size, stride, return_indices=True)
    row = index // x.shape[3] - torch.arange(y.shape[2], device=x.device)[:, None] * stride
    column = index % x.shape[3] - torch.arange(y.shape[3], device=x.device) * stride
    return y, (row * kernel_size + column).to(torch.uint8)


def same_format(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dense `a` follows the order of `b`'s strides, channels first or last."""
    if 1 in (*a.shape[1:], *b.shape[1:]):
        return True  # with a side or the channels of 1, one memory can have both formats
    last = b.stride(1) == 1
    return a.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def same_bits(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def check_bad_input(fn: Callable[..., Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fn(**arguments)


def check_op(op: Any, arguments: tuple[Any, ...], tier: Any) -> None:
    """`opcheck`; in the slow interpreter without tracing and autograd, which are the same in every tier."""
    if tier.name == "interpreter":
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    else:
        torch.library.opcheck(op, arguments)


def in_interpreter(test: Callable[..., None]) -> Callable[..., None]:
    """Run `test`, which need not take the fixture `tier`, in the interpreter's tier alone."""
    test = pytest.mark.usefixtures("tier")(test)
    return pytest.mark.parametrize("tier", ["interpreter"], indirect=True)(test)


def examples(count: int, interpreted: int) -> settings:
    """Settings of a property: `count` examples; fewer in the interpreter, at up to a second each."""
    # Both fixtures, the tier and the poisoned allocations, may last for all examples of a test.
    return settings(
        max_examples=interpreted if runtime.INTERPRETING else count, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip
