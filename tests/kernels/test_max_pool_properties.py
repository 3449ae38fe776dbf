"""Properties of pooling with switches for any shape, window, dtype and layout, exactly.

Values are small whole numbers, so that ties abound and no sum rounds, in any type: every comparison is for equality.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastnst_kernels import (
    max_pool2d_switches,
    max_pool2d_switches_reference,
    max_unpool2d_switches,
    max_unpool2d_switches_reference,
)
from fastnst_kernels.pool.max_pool import gather_switches_reference
from helpers.kernels.kernel_cases import (
    DTYPES,
    LAYOUTS,
    examples,
    same_bits,
    same_format,
    switches_of_torch,
    whole_numbers,
)

gather_switches = torch.ops.fastnst.gather_switches

seeds = st.integers(0, 2**16)


@st.composite
def pairs_of_two(draw):
    """Shape and window for the 2×2 kernels: odd and even sides, primes, and rows that fill vectors."""
    height, width = draw(st.integers(2, 9)), draw(st.sampled_from([2, 3, 4, 5, 7, 8, 13, 16, 18, 31]))
    return (draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 4, 8, 17, 24, 32])), height, width), 2, 2


@st.composite
def windows(draw):
    """Shape, window and stride: overlap, gaps, strides beyond the image, single pixels."""
    shape = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 11))
    return shape, draw(st.integers(1, min(3, *shape[2:]))), draw(st.integers(1, 4))


def with_special(shape, dtype, seed, device, special=()):
    """Small whole numbers, one in eight of them replaced by one of `special`."""
    x = whole_numbers(shape, torch.float32, "cpu", seed, most=4)
    if special:
        generator = torch.Generator().manual_seed(seed + 1)
        chosen = torch.tensor(special)[torch.randint(len(special), shape, generator=generator)]
        x = torch.where(torch.randint(8, shape, generator=generator) == 0, chosen, x)
    return x.to(device, dtype)


def check_pool(tier, case, dtype, layout, seed, special):
    shape, kernel_size, stride = case
    x = LAYOUTS[layout](with_special(shape, dtype, seed, tier.device, special))
    y, switches = max_pool2d_switches(x, kernel_size, stride)
    expected, expected_switches = switches_of_torch(x, kernel_size, stride)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(switches, expected_switches)
    assert same_format(y, switches)


def check_adjoints(tier, case, dtype, layout, seed):
    """⟨S x, y⟩ = ⟨x, Sᵀy⟩ in fp64; S x, Sᵀy and the pool's gradient as in PyTorch."""
    shape, kernel_size, stride = case
    x = LAYOUTS[layout](with_special(shape, dtype, seed, tier.device)).requires_grad_()
    pooled, switches = max_pool2d_switches(x, kernel_size, stride)
    dy = LAYOUTS[layout](with_special(pooled.shape, dtype, seed + 1, tier.device))
    spread = max_unpool2d_switches(dy, switches, shape[2:], kernel_size, stride)
    expected = max_unpool2d_switches_reference(dy.double(), switches, shape[2:], kernel_size, stride)
    assert torch.equal(spread.double(), expected)
    other = LAYOUTS[layout](with_special(shape, dtype, seed + 2, tier.device))
    picked = gather_switches(other, switches, kernel_size, stride)
    assert torch.equal(picked, gather_switches_reference(other, switches, kernel_size, stride))
    assert (picked.double() * dy.double()).sum() == (other.double() * spread.double()).sum()
    leaf = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.max_pool2d(leaf, kernel_size, stride), leaf, dy.double())
    (dx,) = torch.autograd.grad(pooled, x, dy)
    assert torch.equal(dx.double(), expected)


dtypes, layouts = st.sampled_from(DTYPES), st.sampled_from(sorted(LAYOUTS))
specials = st.sampled_from([(), (-float("inf"),), (float("nan"),), (float("nan"), float("inf"), -float("inf"), -0.0)])


@examples(20, interpreted=8)
@given(case=pairs_of_two(), dtype=dtypes, layout=layouts, seed=seeds, special=specials)
def test_max_pool_2x2_of_any_input(tier, case, dtype, layout, seed, special):
    check_pool(tier, case, dtype, layout, seed, special)


@examples(20, interpreted=8)
@given(case=windows(), dtype=dtypes, layout=layouts, seed=seeds, special=specials)
def test_max_pool_of_any_input(tier, case, dtype, layout, seed, special):
    check_pool(tier, case, dtype, layout, seed, special)


@examples(20, interpreted=8)
@given(case=pairs_of_two(), dtype=dtypes, layout=layouts, seed=seeds)
def test_max_unpool_2x2_of_any_input(tier, case, dtype, layout, seed):
    check_adjoints(tier, case, dtype, layout, seed)


@examples(20, interpreted=8)
@given(case=windows(), dtype=dtypes, layout=layouts, seed=seeds)
def test_max_unpool_of_any_input(tier, case, dtype, layout, seed):
    check_adjoints(tier, case, dtype, layout, seed)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", [(1, 512, 4, 4), (1, 3, 2, 66), (2, 1, 5, 34), (1, 96, 2, 2), (3, 5, 3, 8)])
def test_pool_2x2_with_blocks_of_every_kind(tier, layout, shape):
    """Channels that fill a tile, rows longer than one, a single channel, blocks of channels and of rows."""
    check_pool(tier, (shape, 2, 2), torch.float16, layout, 0, ())
    check_adjoints(tier, (shape, 2, 2), torch.float16, layout, 0)


@pytest.mark.parametrize("value", [0.0, 3.0, -float("inf")])
@pytest.mark.parametrize(("kernel_size", "stride"), [(2, 2), (3, 2)])
def test_max_pool_of_a_constant_points_at_the_first(tier, kernel_size, stride, value):
    x = LAYOUTS["channels_last"](torch.full((1, 17, 6, 7), value, device=tier.device))
    y, switches = max_pool2d_switches(x, kernel_size, stride)
    assert (y == value).all()
    assert not switches.any()


def test_max_pool_of_single_pixels(tier):
    """H·W = 1 with windows of 1: the pool is the identity, and so is its adjoint."""
    x = with_special((1, 32, 1, 1), torch.bfloat16, 0, tier.device)
    y, switches = max_pool2d_switches(x, 1, 1)
    assert torch.equal(y, x)
    assert not switches.any()
    assert torch.equal(max_unpool2d_switches(y, switches, (1, 1), 1, 1), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_max_pool_reference_is_the_op(dtype):
    """The plain functions say the same as the ops' PyTorch path, which takes shorter ways."""
    x = with_special((2, 3, 9, 8), dtype, 0, "cpu")
    for kernel_size, stride in [(2, 2), (3, 1), (3, 4)]:
        pooled = max_pool2d_switches(x, kernel_size, stride)
        expected = max_pool2d_switches_reference(x, kernel_size, stride)
        assert same_bits(pooled, expected)
        unpooled = max_unpool2d_switches(*pooled, (9, 8), kernel_size, stride)
        assert torch.equal(unpooled, max_unpool2d_switches_reference(*pooled, (9, 8), kernel_size, stride))
