"""Instance normalisation in every tier: against PyTorch and fp64, and where norms tend to break."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fastnst_kernels import instance_norm, instance_norm_reference, runtime
from fastnst_kernels.norm import dispatch
from helpers.kernel_cases import (
    DTYPES,
    LAYOUTS,
    check_bad_input,
    gradients,
    parameters,
    randn,
    same_format,
    spread_like,
)
from helpers.tolerances import assert_as_exact_as_torch

# Odd and prime sides; C = 3, 17 and 32; a single sample; more rows than a tile holds.
SHAPES = [(2, 3, 7, 11), (1, 17, 5, 13), (2, 32, 13, 19), (3, 5, 2, 1)]
CASES = [("channels_last", shape) for shape in SHAPES] + [(layout, SHAPES[0]) for layout in LAYOUTS]
VARIANTS = [(False, False), (False, True), (True, False), (True, True)]
UNPLACED = (1, [0, 0, 0, 0], "reflect")  # the op's own arguments: no enlargement, no border
# A residual's border and where the result goes.
PLACEMENTS = [(0, {}), (1, {"upsample": 2, "padding": (1, 2, 0, 3)}), (2, {"padding": 1, "padding_mode": "zeros"})]


def torch_instance_norm(x, weight, bias, *, eps=1e-5, residual=None, relu=False):
    y = F.instance_norm(x, weight=weight.to(x.dtype), bias=bias.to(x.dtype), eps=eps)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def check(tier, x, weight, bias, *, conditioning=0.0, residual=None, dy=None, peer=torch_instance_norm, **options):
    """Result and every gradient of the op against fp64, relative to PyTorch's own error; returns (y, gradients)."""
    dy = randn(x.shape, x.dtype, tier.device, seed=99) if dy is None else dy
    inputs = [x, weight, bias] if residual is None else [x, weight, bias, residual]

    def run(fn: Callable[..., torch.Tensor], dtype: torch.dtype | None):
        def call(x, weight, bias, residual=None):
            return fn(x, weight, bias, residual=residual, **options)

        return gradients(call, inputs, dy, dtype)

    y, grads = run(instance_norm, None)
    peer_y, peer_grads = run(peer, None)
    true_y, true_grads = run(instance_norm_reference, torch.float64)
    assert y.dtype == x.dtype
    assert_as_exact_as_torch(y, peer_y, true_y, conditioning=conditioning, what="y")
    for name, *three in zip(("dx", "d_weight", "d_bias", "d_residual"), grads, peer_grads, true_grads, strict=False):
        terms = x[:, 0].numel() if name in ("d_weight", "d_bias") else 0
        assert_as_exact_as_torch(*three, dtype=x.dtype, conditioning=conditioning + terms**0.5, what=name)
    return y, grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "shape"), list(dict.fromkeys(CASES)), ids=str)
def test_agrees_with_torch(tier, dtype, shape, layout):
    x = LAYOUTS[layout](randn(shape, dtype, tier.device))
    weight, bias = parameters(shape[1], tier.device)
    y, grads = check(tier, x, weight, bias)
    assert same_format(y, x)
    assert same_format(grads[0], x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("with_residual", "relu"), VARIANTS)
def test_residual_and_relu(tier, dtype, with_residual, relu):
    shape = (2, 17, 5, 7)
    x = LAYOUTS["channels_last"](randn(shape, dtype, tier.device))
    weight, bias = parameters(17, tier.device)
    residual = randn(shape, dtype, tier.device, seed=5) if with_residual else None
    y, _ = check(tier, x, weight, bias, residual=residual, relu=relu)
    assert (y.min() >= 0) == relu


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("programs", [1, 4, 512])
def test_any_split_of_the_rows(tier, layout, programs, monkeypatch):
    """One chunk of many tiles, a few, many chunks of one tile, and partial results merged in several rounds."""
    monkeypatch.setattr(runtime, "TARGET_PROGRAMS", programs)
    monkeypatch.setattr(dispatch, "_TILE_ELEMENTS", 64)
    monkeypatch.setattr(dispatch, "_MERGE_ROWS", 2)
    x = LAYOUTS[layout](randn((2, 3, 11, 13), torch.float32, tier.device) + 3)
    check(tier, x, *parameters(3, tier.device), relu=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mean_that_dwarfs_the_deviation(tier, layout):
    """E[x²] − E[x]² would lose every digit here."""
    x = LAYOUTS[layout](randn((2, 8, 33, 31), torch.float32, tier.device) + 1e4)
    check(tier, x, *parameters(8, tier.device), conditioning=1e4)


def test_constant_channel_gives_its_bias(tier):
    """With a variance of 0, 1/√ε ≈ 316 magnifies whatever the subtraction of the mean leaves over."""
    weight, bias = parameters(3, tier.device)
    x = torch.full((2, 3, 5, 7), 1234.5, device=tier.device)
    y, _ = check(tier, x, weight, bias, conditioning=1234.5 / 1e-5**0.5)
    if tier.implementation == "triton":
        assert torch.equal(y, bias.view(1, 3, 1, 1).expand_as(y))


def test_single_position_gives_bias_and_residual(tier):
    """x equals its own mean; PyTorch refuses this case, a network on a tiny picture should not."""
    weight, bias = parameters(3, tier.device)
    x, residual = (randn((2, 3, 1, 1), torch.float32, tier.device, seed=s) for s in (1, 2))
    y = instance_norm(x, weight, bias, residual=residual)
    torch.testing.assert_close(y, bias.view(1, 3, 1, 1) + residual, rtol=0, atol=1e-4)  # 1/√ε times rounding


def test_hand_computed(tier):
    """μ = 2, σ² = 1 and ε = 3 halve the deviations ±1."""
    x = torch.tensor([1.0, 3.0, 1.0, 3.0], device=tier.device).view(1, 1, 2, 2)
    one = torch.ones(1, device=tier.device)
    y = instance_norm(x, 4 * one, 0.5 * one, eps=3.0)
    assert y.flatten().tolist() == [-1.5, 2.5, -1.5, 2.5]
    assert instance_norm(x, 4 * one, 0.5 * one, eps=3.0, relu=True).flatten().tolist() == [0, 2.5, 0, 2.5]


def test_nan_stays_in_its_plane(tier):
    x = randn((2, 3, 4, 5), torch.float32, tier.device)
    x[1, 2, 0, 0] = float("nan")
    y = instance_norm(x, *parameters(3, tier.device), relu=True)
    bad = torch.zeros(2, 3, dtype=torch.bool)
    bad[1, 2] = True
    assert torch.equal(y.isnan().cpu(), bad[:, :, None, None].expand(y.shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice(tier, dtype):
    x = LAYOUTS["channels_last"](randn((2, 17, 23, 29), dtype, tier.device))
    weight, bias = parameters(17, tier.device)
    dy = randn(x.shape, dtype, tier.device, seed=3)
    first, second = (gradients(lambda *a: instance_norm(*a, relu=True), [x, weight, bias], dy) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
def test_gradient_of_any_layout(tier, layout):
    x = LAYOUTS["channels_last"](randn((2, 5, 6, 7), torch.float32, tier.device))
    dy = spread_like(x) if layout == "expanded" else LAYOUTS[layout](randn(x.shape, x.dtype, tier.device, seed=8))
    check(tier, x, *parameters(5, tier.device), dy=dy, relu=True)


def test_backward_twice(tier):
    x = randn((2, 3, 5, 7), torch.float32, tier.device).requires_grad_()
    y = instance_norm(x, *parameters(3, tier.device), relu=True)
    dy = randn(y.shape, y.dtype, tier.device, seed=4)
    (once,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (again,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(once, again)


def test_mask_recomputed_or_kept_is_the_same(tier):
    """The GPU recomputes the ReLU's mask, the CPU takes it from y; both are what masking dy beforehand gives."""
    x = randn((2, 3, 9, 7), torch.float32, tier.device)
    weight, bias = parameters(3, tier.device)
    y, mean, rstd = torch.ops.fastnst.instance_norm(x, weight, bias, None, 1e-5, True, *UNPLACED)
    dy = randn(x.shape, x.dtype, tier.device, seed=4)
    backward, saved = torch.ops.fastnst.instance_norm_backward, (x, weight, bias, mean, rstd, None)
    masked = backward(dy, *saved, y if tier.implementation == "reference" else None, True, *UNPLACED, 0)
    kept = backward(dy * (y > 0), *saved, None, False, *UNPLACED, 0)
    assert all(torch.equal(a, b) for a, b in zip(masked, kept, strict=True))
    assert torch.equal(masked[3], dy * (y > 0))


def test_under_autocast(tier):
    """A convolution hands over bfloat16, the parameters stay fp32, and so do their gradients."""
    weight, bias = (p.requires_grad_() for p in parameters(4, tier.device))
    image = randn((1, 3, 8, 8), torch.float32, tier.device)
    filters = randn((4, 3, 3, 3), torch.float32, tier.device)
    with torch.autocast(tier.device.type, torch.bfloat16):
        x = F.conv2d(image, filters)
        y = instance_norm(x, weight, bias, residual=randn(x.shape, torch.float32, tier.device), relu=True)
    assert x.dtype == y.dtype == torch.bfloat16
    y.backward(randn(y.shape, y.dtype, tier.device))
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_parameters_and_residual_of_any_layout(tier):
    """Slices of larger tensors, and a residual in the other memory format."""
    x = LAYOUTS["channels_last"](randn((2, 5, 3, 4), torch.float32, tier.device))
    weight, bias = (p[::2] for p in parameters(10, tier.device))
    check(tier, x, weight, bias, residual=randn(x.shape, x.dtype, tier.device, seed=6))


@pytest.mark.parametrize(
    ("relu", "border", "wanted", "place"),
    [(False, 0, -1, UNPLACED), (True, 1, 1, (2, [1, 0, 0, 1], "symmetric"))],
)
def test_registered_as_pytorch_demands(tier, relu, border, wanted, place):
    x = LAYOUTS["channels_last"](randn((1, 2, 3, 2), torch.float32, tier.device)).requires_grad_()
    weight, bias = (p.requires_grad_() for p in parameters(2, tier.device))
    residual = randn((1, 2, 3 + 2 * border, 2 + 2 * border), x.dtype, tier.device, seed=2).requires_grad_()
    torch.library.opcheck(torch.ops.fastnst.instance_norm, (x, weight, bias, residual, 1e-5, relu, *place))
    with torch.no_grad():
        y, mean, rstd = torch.ops.fastnst.instance_norm(x, weight, bias, residual, 1e-5, relu, *place)
        saved = [t.detach() for t in (randn(y.shape, x.dtype, tier.device), x, weight, bias, mean, rstd, residual, y)]
        torch.library.opcheck(torch.ops.fastnst.instance_norm_backward, (*saved, relu, *place, wanted))


@pytest.mark.parametrize("fn", [instance_norm, instance_norm_reference])
@pytest.mark.parametrize(("with_residual", "relu"), VARIANTS)
@pytest.mark.parametrize(("border", "place"), PLACEMENTS)
def test_gradcheck(fn, with_residual, relu, border, place):
    x = randn((2, 3, 3, 4), torch.float64, seed=1).requires_grad_()
    residual = randn((2, 3, 3 + 2 * border, 4 + 2 * border), torch.float64, seed=2).requires_grad_()
    weight, bias = (p.double().requires_grad_() for p in parameters(3))
    inputs = [x, weight, bias, residual] if with_residual else [x, weight, bias]
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, residual=None: fn(x, weight, bias, residual=residual, relu=relu, **place), inputs
    )


@pytest.mark.parametrize(("border", "place"), PLACEMENTS)
def test_traced_in_one_graph(border, place):
    x = LAYOUTS["channels_last"](randn((2, 3, 5, 7), torch.float32)).requires_grad_()
    residual = randn((2, 3, 5 + 2 * border, 7 + 2 * border), seed=2).requires_grad_()
    weight, bias = parameters(3)

    def run(x, residual):
        return instance_norm(x, weight, bias, residual=residual, relu=True, **place)

    dy = randn(run(x, residual).shape, x.dtype, seed=3)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    expected, actual = (gradients(fn, [x, residual], dy) for fn in (run, compiled))
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(actual[1], expected[1], strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 5)}, r"x has shape \(3, 4, 5\), expected 4 dimensions"),
        ({"x": torch.zeros(0, 3, 4, 5)}, r"x has shape \(0, 3, 4, 5\): it holds no elements"),
        ({"x": torch.zeros(2, 3, 4, 5, dtype=torch.int32)}, r"x is torch.int32, expected float32"),
        ({"weight": torch.zeros(4)}, r"weight has shape \(4,\), expected \(3,\): x is \(2, 3, 4, 5\)"),
        ({"bias": torch.zeros(3, 1)}, r"bias has shape \(3, 1\), expected \(3,\)"),
        ({"bias": torch.zeros(3, dtype=torch.int64)}, r"bias is torch.int64, expected a floating type"),
        ({"weight": torch.zeros(3, device="meta")}, r"weight is on meta, x on cpu"),
        ({"residual": torch.zeros(2, 3, 4, 6)}, r"residual has shape \(2, 3, 4, 6\), expected x's \(2, 3, 4, 5\), or "),
        ({"residual": torch.zeros(2, 3, 5, 6)}, r"larger by the same even number, for a border that is left out"),
        ({"residual": torch.zeros(2, 3, 2, 3)}, r"residual has shape \(2, 3, 2, 3\), expected x's"),
        ({"residual": torch.zeros(2, 4, 4, 5)}, r"residual has shape \(2, 4, 4, 5\), expected x's"),
    ],
)
def test_bad_input(change, message):
    good = {"x": torch.zeros(2, 3, 4, 5), "weight": torch.ones(3), "bias": torch.zeros(3)}
    check_bad_input(instance_norm, good | change, message)
