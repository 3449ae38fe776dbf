"""Both norms for any shape, type, layout and options: PyTorch's result and gradients, and symmetries of theirs."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.kernel_cases import DTYPES, LAYOUTS, parameters, randn, same_format
from helpers.norm_cases import OPS, check, residual_for, run

# Both fixtures, the tier and the poisoned allocations, may well last for all of a test's examples.
cases = settings(
    deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
SIDES = [1, 2, 3, 4, 5, 7]


@st.composite
def norms(draw):
    """A norm, its input, a residual's border, the options: several values per group, borders that can be."""
    norm, dtype, layout = (draw(st.sampled_from(options)) for options in (sorted(OPS), DTYPES, sorted(LAYOUTS)))
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


def _check(tier, case):
    norm, x, border, options = case
    x = x.to(tier.device)
    y, grads = check(norm, x, border, **options)
    assert same_format(grads[0], x)
    again = run(OPS[norm], x, residual_for(x, border), **options)
    assert all(torch.equal(a, b) for a, b in zip((y, *grads), (again[0], *again[1]), strict=True))


@pytest.mark.parametrize("tier", ["reference", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
@settings(cases, max_examples=64)
@given(case=norms())
def test_any_input(tier, case):
    _check(tier, case)


@pytest.mark.parametrize("tier", ["interpreter"], indirect=True)
@settings(cases, max_examples=10)
@given(case=norms())
def test_any_input_in_the_interpreter(tier, case):
    """Fewer of the same: the interpreter takes about a second for each."""
    _check(tier, case)


@settings(cases, max_examples=8)
@given(
    seed=st.integers(0, 2**16), norm=st.sampled_from(sorted(OPS)), shape=st.sampled_from([(2, 3, 3, 5), (1, 8, 7, 2)]),
    scale=st.sampled_from([0.25, 2.0, 64.0]), shift=st.sampled_from([-3.0, 0.5, 8.0]),
)  # fmt: skip
def test_blind_to_scale_and_shift(tier, seed, norm, shape, scale, shift):
    """The norm of a·x + b is that of x, and the gradient by x has no part along 1 or x̂ in any group."""
    x = LAYOUTS["channels_last"](randn(shape, torch.float32, tier.device, seed=seed))
    affine = parameters(shape[1], tier.device)
    dims = (2, 3) if norm == "instance" else (0, 2, 3)
    y, (dx, _, _) = run(OPS[norm], x, None, eps=1e-12)
    torch.testing.assert_close(OPS[norm](scale * x + shift, *affine, eps=1e-12), y, rtol=0, atol=1e-4)
    size = dx.abs().sum(dims)
    assert (dx.sum(dims).abs() <= 1e-5 * size + 1e-6).all()
    normalized = (x - x.mean(dims, keepdim=True)) / x.std(dims, correction=0, keepdim=True)
    assert ((dx * normalized).sum(dims).abs() <= 1e-5 * size * normalized.abs().max() + 1e-6).all()


@pytest.mark.parametrize("channels", [3, 17, 32, 512])
@pytest.mark.parametrize("norm", OPS)
def test_channels(tier, norm, channels):
    """Rows shorter and longer than a tile's, on prime sides, in one sample."""
    x = LAYOUTS["channels_last"](randn((1, channels, 7, 3), torch.bfloat16, tier.device))
    check(norm, x, 0, relu=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (13, 1)])
@pytest.mark.parametrize("norm", OPS)
def test_thin_pictures(tier, norm, size):
    """A single row, column or pixel, placed by repeating it; of one pixel an instance's mean leaves nothing."""
    x = LAYOUTS["channels_last"](randn((2, 3, *size), torch.float32, tier.device))
    options = {"upsample": 2, "padding": 1, "padding_mode": "symmetric"}
    if norm == "instance" and size == (1, 1):
        y, (dx, d_weight, d_bias) = run(OPS[norm], x, None, **options)
        _, bias = parameters(3, tier.device)
        torch.testing.assert_close(
            y, bias.view(1, 3, 1, 1).expand(2, 3, 4, 4), rtol=0, atol=1e-4
        )  # 1/√ε times rounding
        torch.testing.assert_close(dx, torch.zeros_like(x), rtol=0, atol=1e-2)  # 1/√ε · Σ of 16, times rounding
        torch.testing.assert_close(d_weight, torch.zeros(3, device=tier.device), rtol=0, atol=1e-3)
        assert d_bias.isfinite().all()
    else:
        check(norm, x, **options)


@pytest.mark.parametrize("norm", OPS)
def test_mean_that_dwarfs_the_deviation_placed(tier, norm):
    """Mean 10⁴, deviation 1, in the backward that gathers what was placed, too."""
    x = LAYOUTS["channels_last"](randn((1, 8, 11, 7), torch.float32, tier.device) + 1e4)
    check(norm, x, padding=1, padding_mode="zeros")


@pytest.mark.parametrize("norm", OPS)
def test_constant_input(tier, norm):
    """Every channel becomes its bias, whatever the constant, and dx stays finite."""
    x = LAYOUTS["channels_last"](torch.full((2, 3, 5, 7), -20.25, device=tier.device))
    y, (dx, *_) = run(OPS[norm], x, None, padding=1)
    _, bias = parameters(3, tier.device)
    torch.testing.assert_close(y, bias.view(1, 3, 1, 1).expand(2, 3, 7, 9), rtol=0, atol=1e-3)
    assert dx.isfinite().all()
