"""Upsampling and padding of the norms' results: by hand, against PyTorch, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnst_kernels import batch_norm, instance_norm
from fastnst_kernels.norm import dispatch
from fastnst_kernels.norm.upsample_pad import (
    UpsamplePad,
    unpadded,
    upsample_pad,
    upsample_pad_adjoint,
    upsample_pad_reference,
)
from helpers.kernels.kernel_cases import LAYOUTS, check_bad_input, randn, same_bits, same_format, whole_numbers
from helpers.kernels.norm_cases import PAD_OPTIONS, check, op, run, torch_upsample_pad

MODES = ["reflect", "symmetric", "zeros"]
# [[1, 2, 3], [4, 5, 6]] padded by one.
BY_ONE = {
    "reflect": [[5, 4, 5, 6, 5], [2, 1, 2, 3, 2], [5, 4, 5, 6, 5], [2, 1, 2, 3, 2]],
    "symmetric": [[1, 1, 2, 3, 3], [1, 1, 2, 3, 3], [4, 4, 5, 6, 6], [4, 4, 5, 6, 6]],
    "zeros": [[0, 0, 0, 0, 0], [0, 1, 2, 3, 0], [0, 4, 5, 6, 0], [0, 0, 0, 0, 0]],
}
# [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]] with 1 at the left, 2 at the right, 0 at the top, 3 at the bottom.
UNEVEN = {
    "reflect": [[2, 1, 2, 3, 2, 1], [5, 4, 5, 6, 5, 4], [8, 7, 8, 9, 8, 7], [11, 10, 11, 12, 11, 10],
                [8, 7, 8, 9, 8, 7], [5, 4, 5, 6, 5, 4], [2, 1, 2, 3, 2, 1]],
    "symmetric": [[1, 1, 2, 3, 3, 2], [4, 4, 5, 6, 6, 5], [7, 7, 8, 9, 9, 8], [10, 10, 11, 12, 12, 11],
                  [10, 10, 11, 12, 12, 11], [7, 7, 8, 9, 9, 8], [4, 4, 5, 6, 6, 5]],
    "zeros": [[0, 1, 2, 3, 0, 0], [0, 4, 5, 6, 0, 0], [0, 7, 8, 9, 0, 0], [0, 10, 11, 12, 0, 0],
              [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
}  # fmt: skip
# [[1, 2], [3, 4]] upsampled and padded by one.
UPSAMPLED = {
    "reflect": [[1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4], [3, 3, 3, 4, 4, 4],
                [3, 3, 3, 4, 4, 4]],
    "symmetric": [[1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4], [3, 3, 3, 4, 4, 4],
                  [3, 3, 3, 4, 4, 4]],
    "zeros": [[0, 0, 0, 0, 0, 0], [0, 1, 1, 2, 2, 0], [0, 1, 1, 2, 2, 0], [0, 3, 3, 4, 4, 0], [0, 3, 3, 4, 4, 0],
              [0, 0, 0, 0, 0, 0]],
}  # fmt: skip
BY_HAND = [
    *((mode, 1, (1, 1, 1, 1), (2, 3), BY_ONE[mode]) for mode in MODES),
    *((mode, 1, (1, 2, 0, 3), (4, 3), UNEVEN[mode]) for mode in MODES),
    *((mode, 2, (1, 1, 1, 1), (2, 2), UPSAMPLED[mode]) for mode in MODES),
]


@pytest.mark.parametrize(("mode", "upsample", "border", "size", "expected"), BY_HAND)
def test_upsample_pad_by_hand(tier, mode, upsample, border, size, expected):
    """Through a norm that is the identity; with dy = 1 each d_residual is the number of copies."""
    z = torch.arange(1.0, size[0] * size[1] + 1, device=tier.device).view(1, 1, *size)
    weight, bias = (t.view(1) for t in (z.var(correction=0).sqrt(), z.mean()))
    residual = torch.zeros_like(z).requires_grad_()
    options = {"upsample": upsample, "padding": border, "padding_mode": mode}
    y = instance_norm(z, weight, bias, eps=0.0, residual=residual, **options)
    torch.testing.assert_close(y.tolist()[0][0], torch.tensor(expected).float().tolist(), rtol=1e-6, atol=0)
    y.backward(torch.ones_like(y))
    copies = [float(sum(row.count(value) for row in expected)) for value in range(1, size[0] * size[1] + 1)]
    assert residual.grad is not None
    assert residual.grad.flatten().tolist() == copies


@pytest.mark.parametrize(
    ("norm", "layout", "dtype", "mode", "border", "options"),
    [
        ("instance", "channels_last", torch.float32, "reflect", 1, {"padding": (1, 2, 0, 3), "relu": True}),
        ("batch", "contiguous", torch.float32, "symmetric", 2, {"padding": (1, 2, 0, 3), "relu": True}),
        ("instance", "contiguous", torch.bfloat16, "symmetric", None, {"upsample": 2, "padding": 1, "relu": True}),
        ("batch", "channels_last", torch.bfloat16, "reflect", 0, {"padding": 1}),
        ("instance", "channels_last", torch.float16, "zeros", 2, {"upsample": 2, "padding": 1}),
        ("batch", "contiguous", torch.float16, "zeros", 1, {"padding": (1, 2, 0, 3), "relu": True}),
        ("instance", "contiguous", torch.float32, "reflect", None, {"upsample": 2}),
    ],
)
def test_norm_with_upsample_pad_agrees_with_torch(tier, norm, layout, dtype, mode, border, options):
    shape = (1, 2, 5, 5) if tier.name == "interpreter" else (1, 3, 5, 7)
    x = LAYOUTS[layout](randn(shape, dtype, tier.device))
    options = {"upsample": 1, "padding": 0, "padding_mode": mode} | options
    # Whole numbers, whose sums over copies are exact in 16 bits, too.
    padded = UpsamplePad.checked(x, **{name: options[name] for name in PAD_OPTIONS}).shape(x)
    dy = whole_numbers(padded, dtype, tier.device, seed=99)
    y, dx, *_ = check(norm, x, border, dy=dy, **options)
    assert same_format(y, x)
    assert same_format(dx, x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("relu", [False, True])
def test_norm_with_overlapping_strips(tier, mode, relu):
    """4 rows padded by 3: PyTorch pads. The residual's margin is more than half of a side, too."""
    assert not UpsamplePad(1, (3, 3, 3, 3), mode).supports_kernels(4, 5)
    x = LAYOUTS["channels_last"](randn((1, 3, 4, 5), torch.float32, tier.device))
    check("instance", x, 3, padding=3, padding_mode=mode, relu=relu)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("upsample", "size", "border"), [(1, 5, 1), (1, 6, 2), (2, 3, 2), (2, 2, 1)])
def test_supports_kernels_from_the_size_where_strips_meet(mode, upsample, size, border):
    """The smallest image that the kernels pad themselves has 2·border + 2·skip rows."""
    pad = UpsamplePad(upsample, (border,) * 4, mode)
    least = 2 * border + 2 * pad.skip
    assert pad.supports_kernels(size, size) == (upsample * size >= least)
    assert pad.supports_kernels(-(-least // upsample), size + least)
    assert not pad.supports_kernels((least - 1) // upsample, size + least)


@pytest.mark.parametrize(("mode", "most"), [("reflect", 4), ("symmetric", 5)])
@pytest.mark.parametrize("norm", [instance_norm, batch_norm])
def test_norm_pads_as_wide_as_it_mirrors_and_no_wider(tier, norm, mode, most):
    x = randn((2, 2, 5, 9), torch.float32, tier.device)
    ones = torch.ones(2, device=tier.device)
    given = {"x": x, "weight": ones, "bias": ones, "padding_mode": mode}
    if norm is batch_norm:
        given |= {"running_mean": ones.clone(), "running_var": ones.clone(), "training": True}
    assert norm(**given, padding=(0, 0, most, most)).shape == (2, 2, 5 + 2 * most, 9)
    message = (
        rf"padding is \(0, 0, {most + 1}, 0\) .* can mirror at most {most} rows and {most + 4} columns of an image"
    )
    check_bad_input(norm, given | {"padding": (0, 0, most + 1, 0)}, message)
    check_bad_input(norm, given | {"padding": (0, most + 5, 0, 0)}, rf"padding is \(0, {most + 5}, 0, 0\)")
    assert norm(**given, upsample=2, padding=most + 1).shape == (2, 2, 12 + 2 * most, 20 + 2 * most)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upsample": 3}, r"upsample is 3, expected 1 or 2"),
        ({"upsample": 0}, r"upsample is 0, expected 1 or 2"),
        ({"padding": -1}, r"padding is -1, expected a number or \(left, right, top, bottom\), none negative"),
        ({"padding": (0, 0, -2, 0)}, r"padding is \(0, 0, -2, 0\), expected"),
        ({"padding": (1, 1)}, r"padding is \(1, 1\), expected"),
        ({"padding_mode": "circular"}, r"padding_mode is 'circular', expected one of 'reflect', 'symmetric', 'zeros'"),
    ],
)
def test_norm_refuses_bad_padding(change, message):
    ones = torch.ones(3)
    check_bad_input(instance_norm, {"x": torch.zeros(2, 3, 4, 5), "weight": ones, "bias": ones} | change, message)


@st.composite
def pads(draw):
    """A size and an `UpsamplePad` that it allows, strips that overlap included."""
    height, width, upsample = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.sampled_from([1, 2]))
    mode = draw(st.sampled_from(MODES))
    rows, columns = (upsample * side - (mode == "reflect") for side in (height, width))
    most = (4, 4) if mode == "zeros" else (min(rows, 4), min(columns, 4))
    padding = [draw(st.integers(0, most[1])) for _ in range(2)] + [draw(st.integers(0, most[0])) for _ in range(2)]
    return (height, width), UpsamplePad(upsample, tuple(padding), mode)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(case=pads(), layout=st.sampled_from(["contiguous", "channels_last"]))
def test_upsample_pad_and_its_adjoint(case, layout):
    """P z is what PyTorch computes, and ⟨P z, dy⟩ = ⟨z, Pᵀdy⟩."""
    size, pad = case
    assert UpsamplePad.from_ints(pad.as_ints()) == pad
    z = LAYOUTS[layout](randn((2, 3, *size), torch.float64))
    y = upsample_pad(z, pad)
    assert y.shape == pad.shape(z)
    assert same_bits([y, y], [upsample_pad_reference(z, pad), torch_upsample_pad(z, pad)])
    assert torch.equal(unpadded(y, pad, size), z)
    dy = LAYOUTS[layout](randn(y.shape, torch.float64, seed=1))
    dz = upsample_pad_adjoint(dy, pad)
    assert dz.shape == z.shape
    assert abs((y * dy).sum() - (z * dz).sum()) <= 1e-12 * (y.abs() * dy.abs()).sum()
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(upsample_pad_reference(leaf, pad), leaf, dy)
    torch.testing.assert_close(dz, expected, rtol=1e-12, atol=1e-12)


def test_norm_backward_does_not_alias_the_residuals_gradient():
    """Cropped out of dy, it could be dy's own memory, which PyTorch forbids."""
    x = randn((1, 1, 3, 4))
    residual = randn(x.shape, seed=1).requires_grad_()
    one = torch.ones(1)
    y = instance_norm(x, one, one, residual=residual, padding=(0, 0, 1, 0), padding_mode="zeros")
    dy = randn(y.shape, seed=2)
    (d_residual,) = torch.autograd.grad(y, residual, dy)
    assert torch.equal(d_residual, dy[:, :, 1:])
    assert d_residual.data_ptr() != dy[:, :, 1:].data_ptr()


def test_norm_kernels_refuse_what_32_bits_cannot_count():
    """y counts, not x alone: 4 times the pixels. Nothing is allocated."""
    x = torch.empty((1, 1, 2**15, 2**14), device="meta")
    dispatch._check_size(x, UpsamplePad())
    with pytest.raises(ValueError, match=r"2147483648 elements per sample, but the kernels take less than 2147483648"):
        dispatch._check_size(x, UpsamplePad(2))


@pytest.mark.parametrize("mode", MODES)
def test_norm_crops_the_residuals_margin(tier, mode):
    """Whatever stands there, even NaN; its gradient there is zero."""
    x = LAYOUTS["channels_last"](randn((1, 3, 4, 5), torch.float32, tier.device))
    inner = randn(x.shape, x.dtype, tier.device, seed=1)
    outer = F.pad(inner, (1,) * 4, value=float("nan"))
    options = {"relu": True, "padding": 1, "padding_mode": mode}
    expected, _ = run(op("instance"), x, inner, **options)
    results, _ = run(op("instance"), x, outer, **options)
    assert same_bits(results[:4], expected[:4])
    assert torch.equal(results[4], F.pad(expected[4], (1,) * 4))
