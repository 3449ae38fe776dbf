"""Bytes that the 2×2 kernels move, counted, and kernels on tensors of more than 2³¹ elements."""

import pytest
import torch

from fastnst_kernels import (
    max_pool2d_switches,
    max_pool2d_switches_reference,
    max_unpool2d_switches,
    max_unpool2d_switches_reference,
)
from fastnst_kernels.pool import kernels as max_pool_kernels
from fastnst_kernels.pool import kernels_2x2
from helpers.byte_counter import count_bytes
from helpers.kernel_cases import DTYPES, LAYOUTS, in_interpreter, randn
from helpers.last_program import LastProgram


@in_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", [(2, 64, 4, 16), (1, 512, 2, 4), (2, 24, 4, 18), (1, 3, 9, 11)])
def test_pool_2x2_moves_each_byte_once(layout, shape, dtype):
    """In one launch each, at most 5% above the minimum: x, y, and one byte per window. Of odd sides
    no window covers the last row or column of x, which the pool need not read and the unpool must set to zero."""
    x = LAYOUTS[layout](randn(shape, dtype))
    windows = x[..., ::2, ::2][..., : shape[2] // 2, : shape[3] // 2].numel()
    size = x.element_size()
    with count_bytes() as pooling:
        y, switches = max_pool2d_switches(x)
    assert pooling.launches == 1
    assert pooling.unique_loaded == pooling.loaded
    assert pooling.total <= 1.05 * (x.numel() * size + windows * (size + 1))
    assert pooling.unique_stored == pooling.stored == windows * (size + 1)
    with count_bytes() as unpooling:
        max_unpool2d_switches(y, switches, shape[2:])
    assert unpooling.launches == 1
    assert unpooling.unique_loaded == unpooling.loaded == windows * (size + 1)
    assert unpooling.unique_stored == unpooling.stored == x.numel() * size
    with count_bytes() as gathering:
        torch.ops.fastnst.gather_switches(x, switches, 2, 2)
    assert gathering.launches == 1
    assert gathering.total <= 1.05 * (x.numel() * size + windows * (size + 1))


@in_interpreter
def test_count_bytes_by_hand():
    """Windows of 2 with stride 1 read the middle column of a 2×3 image twice."""
    x = torch.arange(6.0).view(1, 1, 2, 3)
    with count_bytes() as traffic:
        max_pool2d_switches(x, 2, 1)
    assert (traffic.loaded, traffic.unique_loaded) == (8 * 4, 6 * 4)
    assert (traffic.stored, traffic.unique_stored) == (2 * 5, 2 * 5)
    assert (traffic.launches, traffic.total) == (1, 8 * 4 + 2 * 5)


@in_interpreter
@pytest.mark.parametrize(("side", "kernel_size"), [(3352, 2), (3351, 3)])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_pool_kernels_beyond_32_bits(monkeypatch, layout, side, kernel_size):
    """The last program alone, at the end of 2.16·10⁹ elements, where an overflowed offset finds nothing."""
    for module in (kernels_2x2, max_pool_kernels):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, LastProgram(getattr(module, name)))

    def untouched(side: int, dtype: torch.dtype) -> torch.Tensor:
        if layout == "contiguous":
            return torch.empty((3, 64, side, side), dtype=dtype)
        return torch.empty((3, side, side, 64), dtype=dtype).permute(0, 3, 1, 2)

    pooled = (side - kernel_size) // 2 + 1
    x, y, switches = (
        untouched(side, torch.bfloat16),
        untouched(pooled, torch.bfloat16),
        untouched(pooled, torch.uint8),
    )
    assert x.numel() > 2**31
    # The last three windows of the last plane, with the maxima in their last row, which ends the tensor.
    corner = x[-1:, -1:, -kernel_size:, -(kernel_size + 4) :]
    corner.copy_(randn(corner.shape, torch.bfloat16))
    corner[..., -1, :] += 16
    expected, expected_switches = max_pool2d_switches_reference(corner, kernel_size, 2)
    last = (slice(-1, None), slice(-1, None), slice(-1, None), slice(-3, None))
    max_pool_kernels.pool(x, y, switches, kernel_size, 2)
    assert torch.equal(y[last], expected)
    assert torch.equal(switches[last], expected_switches)
    y[last] = 0
    max_pool_kernels.gather(x, switches, y, kernel_size, 2)
    assert torch.equal(y[last], expected)
    max_pool_kernels.unpool(y, switches, x, kernel_size, 2)
    spread = max_unpool2d_switches_reference(expected, expected_switches, corner.shape[2:], kernel_size, 2)
    assert torch.equal(x[-1, -1, -1, -4:], spread[-1, -1, -1, -4:])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 2, 2**31), r"shape \(1, 1, 2, 2147483648\): a row holds 2147483648 elements, .* up to 2147483647"),
        ((1, 512, 2, 2**22), r"a row holds 2147483648 elements"),
        (
            (2, 512, 4, 2**20),
            r"shape \(2, 512, 4, 1048576\): it takes \(4, 524288, 1\) programs, CUDA allows \(2147483647, 65535",
        ),
    ],
)
def test_pool_kernels_refuse_what_32_bits_cannot_count(shape, message):
    """Without memory, as the check comes before the launch."""
    n, c, h, w = shape
    x, y = (
        torch.empty((n, rows, columns, c), device="meta").permute(0, 3, 1, 2)
        for rows, columns in ((h, w), (h // 2, w // 2))
    )
    with pytest.raises(ValueError, match=message):
        max_pool_kernels.pool(x, y, torch.empty_like(y, dtype=torch.uint8), 2, 2)
