"""Properties of both norms for any shape, dtype, layout and options."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastnst_kernels.norm.upsample_pad import UpsamplePad
from helpers.kernel_cases import DTYPES, LAYOUTS, examples, parameters, randn, same_bits, same_format, whole_numbers
from helpers.norm_cases import NORMS, PAD_OPTIONS, check, op, residual_for, run

TRAINED = NORMS[:2]
SIDES = [1, 2, 3, 4, 5, 7]


@st.composite
def norms(draw):
    """A norm, its input, a residual's margin, the options: several values per group, valid paddings."""
    norm, dtype, layout = (draw(st.sampled_from(options)) for options in (TRAINED, DTYPES, sorted(LAYOUTS)))
    height, width = draw(st.sampled_from(SIDES)), draw(st.sampled_from(SIDES[2:]))
    # Contiguous planes are a program each.
    channels = draw(st.sampled_from([1, 2, 3] if "last" not in layout else [1, 3, 8, 17]))
    x = randn((draw(st.integers(1, 2)), channels, height, width), dtype, seed=draw(st.integers(0, 2**16)))
    x = LAYOUTS[layout](x + draw(st.sampled_from([0.0, 0.0, 4.0])))
    border = draw(st.sampled_from([None, 0, 1, 2]))
    options = {"relu": draw(st.booleans()), "upsample": draw(st.sampled_from([1, 1, 2]))}
    options["padding_mode"] = mode = draw(st.sampled_from(["reflect", "symmetric", "zeros"]))
    rows, columns = (options["upsample"] * side - (mode == "reflect") for side in (height, width))
    most = [3, 3, 3, 3] if mode == "zeros" else [min(2, side) for side in (columns, columns, rows, rows)]
    options["padding"] = draw(st.sampled_from([(0,) * 4, None])) or tuple(draw(st.integers(0, n)) for n in most)
    return norm, x, border, options


@examples(64, interpreted=4)
@given(case=norms())
def test_norm_of_any_input(tier, case):
    norm, x, border, options = case
    x = x.to(tier.device)
    # Whole numbers, whose sums over copies are exact in 16 bits, too.
    shape = UpsamplePad.checked(x, **{name: options[name] for name in PAD_OPTIONS}).shape(x)
    dy = whole_numbers(shape, x.dtype, tier.device, seed=99)
    results = check(norm, x, border, dy=dy, **options)
    assert same_format(results[1], x)
    if tier.name != "interpreter":
        assert same_bits(results, run(op(norm), x, residual_for(x, border), dy=dy, **options)[0])


@examples(8, interpreted=4)
@given(
    seed=st.integers(0, 2**16), norm=st.sampled_from(TRAINED), shape=st.sampled_from([(2, 3, 3, 5), (1, 8, 7, 2)]),
    scale=st.sampled_from([0.25, 2.0, 64.0]), shift=st.sampled_from([-3.0, 0.5, 8.0]),
)  # fmt: skip
def test_norm_ignores_scale_and_shift(tier, seed, norm, shape, scale, shift):
    """The norm of a·x + b is that of x, and the gradient by x has no part along 1 or x̂ in any group."""
    x = LAYOUTS["channels_last"](randn(shape, torch.float32, tier.device, seed=seed))
    dims = (2, 3) if norm == "instance" else (0, 2, 3)
    (y, dx, *_), _ = run(op(norm), x, eps=1e-12)
    scaled = op(norm)(scale * x + shift, *parameters(shape[1], tier.device), eps=1e-12)
    torch.testing.assert_close(scaled, y, rtol=0, atol=1e-4)
    size = dx.abs().sum(dims)
    assert (dx.sum(dims).abs() <= 1e-5 * size + 1e-6).all()
    normalized = (x - x.mean(dims, keepdim=True)) / x.std(dims, correction=0, keepdim=True)
    assert ((dx * normalized).sum(dims).abs() <= 1e-5 * size * normalized.abs().max() + 1e-6).all()


@pytest.mark.parametrize("channels", [3, 17, 32, 512])
@pytest.mark.parametrize("norm", TRAINED)
def test_norm_of_any_number_of_channels(tier, norm, channels):
    """Rows shorter and longer than a tile's, on prime sides, in one sample."""
    x = LAYOUTS["channels_last"](randn((1, channels, 3, 2), torch.bfloat16, tier.device))
    check(norm, x, 0, relu=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1)])
@pytest.mark.parametrize("norm", TRAINED)
def test_norm_of_thin_images(tier, norm, size):
    """A single row, column or pixel, padded by repeating it; an instance of one pixel is its own mean."""
    x = LAYOUTS["channels_last"](randn((2, 3, *size), torch.float32, tier.device))
    options = {"padding": 1, "padding_mode": "symmetric"}
    if norm == "instance" and size == (1, 1):
        (y, dx, d_weight, d_bias), _ = run(op(norm), x, **options)
        bias = parameters(3, tier.device)[1].view(1, 3, 1, 1)
        torch.testing.assert_close(y, bias.expand(2, 3, 3, 3), rtol=0, atol=1e-4)  # 1/√ε times rounding
        torch.testing.assert_close(dx, torch.zeros_like(x), rtol=0, atol=1e-2)  # 1/√ε · Σ of 9, times rounding
        torch.testing.assert_close(d_weight, torch.zeros(3, device=tier.device), rtol=0, atol=1e-3)
        assert d_bias.isfinite().all()
    else:
        check(norm, x, **options)


@pytest.mark.parametrize("norm", TRAINED)
def test_norm_with_a_large_mean_and_padding(tier, norm):
    """Mean 10⁴, deviation 1, in the backward that gathers copies, too."""
    x = LAYOUTS["channels_last"](randn((1, 8, 11, 7), torch.float32, tier.device) + 1e4)
    check(norm, x, padding=1, padding_mode="zeros")
