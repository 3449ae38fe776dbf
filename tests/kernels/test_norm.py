"""Instance and batch norm in every tier: against PyTorch and fp64, and where norms tend to break."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from fastnst_kernels import batch_norm, batch_norm_reference, instance_norm, instance_norm_reference, runtime
from fastnst_kernels.norm import dispatch
from fastnst_kernels.norm.recompute import recomputed_batch_norm
from fastnst_kernels.norm.upsample_pad import UpsamplePad
from helpers.kernels.kernel_cases import (
    DTYPES,
    LAYOUTS,
    check_bad_input,
    check_op,
    gradients,
    parameters,
    randn,
    same_bits,
    same_format,
    spread_like,
    with_dtypes,
)
from helpers.kernels.norm_cases import NORMS, by_torch, check, op, run, running_statistics
from helpers.tolerances import assert_as_exact_as_torch

# Odd and prime sides; C = 3, 17 and 32; a single sample; more rows than a tile holds.
SHAPES = [(2, 3, 7, 11), (1, 17, 5, 13), (2, 32, 13, 19), (3, 5, 2, 1)]
CASES = [
    *((norm, "channels_last", shape) for norm in NORMS for shape in SHAPES),
    *((norm, layout, SHAPES[0]) for norm in NORMS for layout in LAYOUTS if layout != "channels_last"),
    *((norm, "channels_last", (4, 3, 1, 1)) for norm in NORMS[1:]),
]
VARIANTS = [(None, False), (None, True), (0, False), (0, True)]  # a residual's margin, ReLU
# A residual's margin, upsampling and padding.
PADS = [(0, {}), (1, {"upsample": 2, "padding": (1, 2, 0, 3)}), (2, {"padding": 1, "padding_mode": "zeros"})]


@pytest.mark.parametrize(("norm", "layout", "shape", "dtype"), with_dtypes(CASES), ids=str)
def test_norm_agrees_with_torch(tier, norm, layout, shape, dtype):
    x = LAYOUTS[layout](randn(shape, dtype, tier.device))
    y, dx, *_ = check(norm, x, conditioning=0.0)
    assert same_format(y, x)
    assert same_format(dx, x)


@pytest.mark.parametrize(("norm", "variant", "dtype"), with_dtypes([*product(NORMS, VARIANTS[1:])]), ids=str)
def test_norm_adds_residual_then_relu(tier, norm, variant, dtype):
    border, relu = variant
    x = LAYOUTS["channels_last"](randn((2, 17, 5, 7), dtype, tier.device))
    y, *_ = check(norm, x, border, conditioning=0.0, relu=relu)
    assert (y.min() >= 0) == relu


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("programs", [1, 4, 512])
@pytest.mark.parametrize("norm", NORMS[:2])
def test_norm_with_any_split_of_the_rows(tier, norm, layout, programs, monkeypatch):
    """One chunk of many tiles, a few, many of one tile; partial results merged in several rounds.

    In contiguous format the chunks of several samples make one channel of a batch; the last chunk of each is short.
    """
    monkeypatch.setattr(runtime, "TARGET_PROGRAMS", programs)
    monkeypatch.setattr(dispatch, "_TILE_ELEMENTS", 32)
    monkeypatch.setattr(dispatch, "_MERGE_ROWS", 2)
    x = LAYOUTS[layout](randn((2, 3, 7, 9), torch.float32, tier.device) + 3)
    check(norm, x, conditioning=0.0, relu=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("norm", NORMS[:2])
def test_norm_with_a_large_mean(tier, norm, layout):
    """E[x²] − E[x]² would lose every digit here."""
    x = LAYOUTS[layout](randn((2, 8, 19, 17), torch.float32, tier.device) + 1e4)
    check(norm, x, conditioning=1e4)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, in lanes that are masked
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("norm", NORMS[:2])
def test_norm_of_a_constant_channel_is_its_bias(tier, norm, layout, dtype):
    """With a variance of 0, 1/√ε ≈ 316 magnifies whatever the subtraction of the mean leaves."""
    x = randn((2, 5, 7, 11), dtype, tier.device)
    x[:, 1:] = torch.tensor([1e-3, -12345.678, 2.0**100 if dtype != torch.float16 else 6e4, 0.0]).view(4, 1, 1)
    weight, bias = parameters(5, tier.device)
    for options in ({}, {"relu": True, "residual": bias.view(5, 1, 1).expand(x.shape).to(dtype)}):
        (y, dx, d_weight, d_bias, *_), running = run(op(norm), LAYOUTS[layout](x), **options)
        expected = (2 * bias).relu() if options else bias
        assert torch.equal(y[:, 1:], expected.to(dtype).view(5, 1, 1).expand(x.shape)[:, 1:])
        assert torch.equal(d_weight[1:], torch.zeros_like(d_weight[1:]))
        g = randn(x.shape, dtype, tier.device, seed=99)
        g = g.double() * (y > 0) if options else g.double()
        centred = g - g.mean((2, 3) if norm == "instance" else (0, 2, 3), keepdim=True)
        truth = centred * weight.view(5, 1, 1) / 1e-5**0.5
        torch.testing.assert_close(
            dx[:, 1:].double(), truth[:, 1:], rtol=0.02, atol=2 * truth.abs().max() * torch.finfo(dtype).eps
        )
        torch.testing.assert_close(d_bias.double(), g.sum((0, 2, 3)), rtol=0, atol=1e-4)
        if norm == "batch":
            assert torch.equal(
                running[1][1:], torch.full_like(running[1][1:], 1.5).lerp_(torch.zeros(4, device=tier.device), 0.1)
            )


@pytest.mark.parametrize("relu", [False, True])
def test_instance_norm_of_one_position_is_bias_and_residual(tier, relu):
    """x equals its own mean; PyTorch refuses this case, a network on a tiny image should not."""
    weight, bias = parameters(3, tier.device)
    x, residual = (randn((2, 3, 1, 1), torch.float32, tier.device, seed=s) for s in (1, 2))
    dy = randn(x.shape, x.dtype, tier.device, seed=3)
    y, (dx, d_weight) = gradients(
        lambda x, weight: instance_norm(x, weight, bias, residual=residual, relu=relu), [x, weight], dy
    )
    expected = bias.view(1, 3, 1, 1) + residual
    assert torch.equal(y, expected.relu() if relu else expected)
    assert not d_weight.any()
    assert dx.abs().max() <= 2.0**-22 / 1e-5**0.5  # rounding of g − Σg/1 in a product


@pytest.mark.parametrize("norm", NORMS[:2])
def test_norm_reference_of_a_constant_is_its_bias(norm):
    x = torch.full((2, 3, 7, 11), 12345.678)
    weight, bias = parameters(3)
    y, (d_weight,) = gradients(lambda w: op(norm, reference=True)(x, w, bias), [weight], randn(x.shape))
    assert torch.equal(y, bias.view(3, 1, 1).expand_as(y))
    assert not d_weight.any()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("norm", NORMS[:2])
def test_norm_with_a_variance_beyond_fp32_is_that_of_torch(tier, norm, layout):
    """From deviations of 1.8·10¹⁹ on σ² = ∞, 1/√(σ² + ε) = 0, and the result the bias: no NaN on any path."""
    for scale in (1e18, 1e20, 1e25, 1e29, 1e33):
        x = LAYOUTS[layout](randn((2, 3, 7, 11), torch.float32, tier.device) * scale)
        (y, dx, d_weight, d_bias), running = run(op(norm), x)
        (peer, peer_dx, peer_d_weight, _), peer_running = run(lambda *a, **o: by_torch(norm, *a, **o), x)
        torch.testing.assert_close(y, peer, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(d_weight, peer_d_weight, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(running, peer_running, rtol=1e-5, atol=1e10)
        assert dx.abs().max() <= 1e-16
        assert peer_dx.abs().max() <= 1e-16
        assert d_bias.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("update", ["op", "reference", "recomputed"])
def test_batch_norm_mixes_16_bit_running_statistics_in_fp32(tier, update, dtype):
    """A variance of 160,000 is beyond fp16, a tenth of it is not; each statistic is rounded once."""
    x = LAYOUTS["channels_last"](randn((3, 4, 9, 8), torch.float32, tier.device) * 400 + 100)
    affine = parameters(4, tier.device)
    mean, var = torch.full((4,), 3.3, device=tier.device, dtype=dtype), torch.ones(4, device=tier.device, dtype=dtype)
    values = x.double()
    expected = (
        mean.double().lerp(values.mean((0, 2, 3)), 0.1), var.double().lerp(values.var((0, 2, 3)), 0.1)
    )  # fmt: skip
    if update == "recomputed":
        recomputed_batch_norm(x, *(p.requires_grad_() for p in affine), mean, var)
    else:
        (batch_norm if update == "op" else batch_norm_reference)(x, *affine, mean, var, training=True)
    for statistic, exact in zip((mean, var), expected, strict=True):
        assert statistic.dtype == dtype
        torch.testing.assert_close(statistic.double(), exact, rtol=0.501 * torch.finfo(dtype).eps, atol=0)


def test_norm_by_hand(tier):
    """Values 1 and 3, twice each: μ = 2, σ² = 1, unbiased 4/3; ε = 3 halves the deviations."""
    x = torch.tensor([1.0, 3.0, 1.0, 3.0], device=tier.device).view(1, 1, 2, 2)
    one = torch.ones(1, device=tier.device)
    assert instance_norm(x, 4 * one, 0.5 * one, eps=3.0).flatten().tolist() == [-1.5, 2.5, -1.5, 2.5]
    assert instance_norm(x, 4 * one, 0.5 * one, eps=3.0, relu=True).flatten().tolist() == [0, 2.5, 0, 2.5]
    x, mean, var = x.view(2, 1, 1, 2), 10 * one, 1 * one
    y = batch_norm(x, 4 * one, 0.5 * one, mean, var, training=True, momentum=0.25, eps=3.0)
    assert y.flatten().tolist() == [-1.5, 2.5, -1.5, 2.5]
    assert mean.item() == 8
    assert var.item() == pytest.approx(0.75 + 0.25 * 4 / 3)
    mean, var = one.clone(), one.clone()
    y = batch_norm(x, 4 * one, 0.5 * one, mean, var, training=False, eps=3.0)
    assert y.flatten().tolist() == [0.5, 4.5, 0.5, 4.5]
    assert mean.item() == var.item() == 1


def test_batch_norm_agrees_with_a_module_over_steps(tier):
    """The running statistics of `BatchNorm2d`, step by step, then its inference."""
    module = torch.nn.BatchNorm2d(5, momentum=0.3).to(tier.device)
    mean, var = torch.zeros(5, device=tier.device), torch.ones(5, device=tier.device)
    affine = (module.weight.detach(), module.bias.detach())
    for step in range(3):
        x = randn((3, 5, 4, 7), device=tier.device, seed=step) * (step + 1)
        torch.testing.assert_close(batch_norm(x, *affine, mean, var, training=True, momentum=0.3), module(x).detach())
    torch.testing.assert_close(mean, module.running_mean)
    torch.testing.assert_close(var, module.running_var)
    module.eval()
    torch.testing.assert_close(batch_norm(x, *affine, mean, var, training=False), module(x).detach())


def test_instance_norm_keeps_nan_in_its_plane(tier):
    x = randn((2, 3, 4, 5), torch.float32, tier.device)
    x[1, 2, 0, 0] = float("nan")
    y = instance_norm(x, *parameters(3, tier.device), relu=True)
    bad = torch.zeros(2, 3, dtype=torch.bool)
    bad[1, 2] = True
    assert torch.equal(y.isnan().cpu(), bad[:, :, None, None].expand(y.shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS[:2])
def test_norm_gives_the_same_bits_twice(tier, norm, dtype):
    shape = (2, 17, 23, 29) if tier.name == "gpu" else (1, 17, 3, 5)
    x = LAYOUTS["channels_last"](randn(shape, dtype, tier.device))
    (first, running), (second, again) = (run(op(norm), x, relu=True) for _ in range(2))
    assert same_bits((*first, *running), (*second, *again))


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("norm", NORMS[:2])
def test_norm_backward_takes_a_gradient_of_any_layout(tier, norm, layout):
    x = LAYOUTS["channels_last"](randn((2, 5, 6, 7), torch.float32, tier.device))
    dy = spread_like(x) if layout == "expanded" else LAYOUTS[layout](randn(x.shape, x.dtype, tier.device, seed=8))
    check(norm, x, conditioning=0.0, dy=dy, relu=True)


def test_norm_backward_masks_as_the_relu_does(tier):
    """The mask recomputed on a GPU, or from y on a CPU: both are what masking dy beforehand gives."""
    x, dy = (randn((2, 3, 9, 7), torch.float32, tier.device, seed=seed) for seed in (0, 4))
    pad = UpsamplePad().as_ints()
    affine = parameters(3, tier.device)
    y, mean, rstd, _ = torch.ops.fastnst.norm(x, *affine, [], None, True, 1e-5, True, pad)
    backward, saved = torch.ops.fastnst.norm_backward, (x, *affine, mean, rstd, None)
    masked = backward(dy, *saved, y if tier.implementation == "reference" else None, False, True, pad, 0)
    assert same_bits(masked, backward(dy * (y > 0), *saved, None, False, False, pad, 0))
    assert torch.equal(masked[3], dy * (y > 0))


def test_norm_backward_twice_and_the_residuals_gradient(tier):
    """Without a ReLU the residual's gradient is dy itself; a graph that is kept can be used again."""
    x = LAYOUTS["channels_last"](randn((2, 3, 5, 7), torch.float32, tier.device)).requires_grad_()
    residual = randn(x.shape, x.dtype, tier.device, seed=2).requires_grad_()
    dy = randn(x.shape, x.dtype, tier.device, seed=3)
    for relu in (False, True):
        y = instance_norm(x, *parameters(3, tier.device), residual=residual, relu=relu)
        first, second = (torch.autograd.grad(y, [x, residual], dy, retain_graph=True) for _ in range(2))
        assert same_bits(first, second)
        assert torch.equal(first[1], dy * (y > 0) if relu else dy)


@pytest.mark.parametrize("norm", NORMS[:2])
def test_norm_under_autocast(tier, norm):
    """A convolution returns bfloat16; parameters, their gradients and running statistics stay fp32."""
    weight, bias = (p.requires_grad_() for p in parameters(4, tier.device))
    running = running_statistics(4, tier.device)
    with torch.autocast(tier.device.type, torch.bfloat16):
        x = F.conv2d(randn((1, 3, 8, 8), device=tier.device), randn((4, 3, 3, 3), device=tier.device))
        residual = randn(x.shape, torch.float32, tier.device)
        y = op(norm)(x, weight, bias, running, residual=residual, relu=True)
    assert x.dtype == y.dtype == torch.bfloat16
    y.backward(randn(y.shape, y.dtype, tier.device))
    assert weight.grad is not None
    assert weight.grad.dtype == running[0].dtype == torch.float32


def test_norm_takes_parameters_and_residual_of_any_layout(tier):
    """Slices of larger tensors, and a residual in the other memory format."""
    x = LAYOUTS["channels_last"](randn((2, 5, 3, 4), torch.float32, tier.device))
    residual = randn(x.shape, x.dtype, tier.device, seed=6)
    inputs = [x, *(p[::2] for p in parameters(10, tier.device)), residual]
    dy = randn(x.shape, x.dtype, tier.device, seed=99)

    def by_torch(x, weight, bias, residual):
        return F.instance_norm(x, weight=weight, bias=bias) + residual

    actual, peer, truth = (
        gradients(fn, inputs, dy, dtype)
        for fn, dtype in (
            (lambda *p: instance_norm(*p[:3], residual=p[3]), None),
            (by_torch, None),
            (lambda *p: instance_norm_reference(*p[:3], residual=p[3]), torch.float64),
        )
    )
    assert_as_exact_as_torch(actual[0], peer[0], truth[0])
    for three in zip(actual[1], peer[1], truth[1], strict=True):
        assert_as_exact_as_torch(*three, conditioning=24**0.5)


@pytest.mark.parametrize(
    ("norm", "relu", "border", "pad"),
    [
        ("instance", False, 0, UpsamplePad()),
        ("inference", True, 0, UpsamplePad()),
        ("batch", True, 1, UpsamplePad(2, (1, 0, 0, 1), "symmetric")),
    ],
)
def test_norm_ops_pass_opcheck(tier, norm, relu, border, pad):
    x = LAYOUTS["channels_last"](randn((1, 3, 3, 2), torch.float32, tier.device)).requires_grad_()
    weight, bias = (p.requires_grad_() for p in parameters(3, tier.device))
    residual = randn((1, 3, 3 + 2 * border, 2 + 2 * border), x.dtype, tier.device, seed=2).requires_grad_()
    statistics = running_statistics(3, tier.device) if norm == "inference" else []
    arguments = (x, weight, bias, statistics, residual, norm == "instance", 1e-5, relu, pad.as_ints())
    check_op(torch.ops.fastnst.norm, arguments, tier)
    with torch.no_grad():
        y, mean, rstd, var = torch.ops.fastnst.norm(*arguments)
    assert [t.numel() for t in (mean, rstd, var)] == ([0] * 3 if statistics else [3, 3, 3 * (norm == "batch")])
    saved = (x, weight, bias, *(statistics or (mean, rstd)), residual, y)
    saved = [t.detach() for t in (randn(y.shape, x.dtype, tier.device), *saved)]
    options = (bool(statistics), relu, pad.as_ints(), border if relu else -1)
    check_op(torch.ops.fastnst.norm_backward, (*saved, *options), tier)


@pytest.mark.parametrize("reference", [False, True], ids=["op", "reference"])
@pytest.mark.parametrize(("variant", "pad"), [(VARIANTS[0], PADS[0]), *((VARIANTS[3], pad) for pad in PADS)])
@pytest.mark.parametrize("norm", NORMS)
def test_norm_gradcheck(norm, reference, variant, pad):
    (residual, relu), (border, options) = variant, pad
    x = randn((2, 2, 3, 3), torch.float64, seed=1)
    inputs = [x, *(p.double() for p in parameters(2))]
    if residual is not None:
        inputs.append(randn((2, 2, 3 + 2 * border, 3 + 2 * border), torch.float64, seed=2))

    def call(x, weight, bias, residual=None):
        running = [statistic.double() for statistic in running_statistics(2)]
        return op(norm, reference)(x, weight, bias, running, residual=residual, relu=relu, **options)

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize(("border", "options"), PADS)
@pytest.mark.parametrize("norm", NORMS[:2])
def test_norm_compiles_to_one_graph(norm, border, options):
    """With the running statistics' mutation."""
    x = LAYOUTS["channels_last"](randn((2, 3, 5, 7), torch.float32))
    residual = randn((2, 3, 5 + 2 * border, 7 + 2 * border), seed=2)
    weight, bias = parameters(3)

    def call(x, residual, running):
        return op(norm)(x, weight, bias, running, residual=residual, relu=True, **options)

    dy = randn(call(x, residual, running_statistics(3)).shape, x.dtype, seed=3)
    outcomes = []
    for fn in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        running = running_statistics(3)
        y, grads = gradients(lambda *inputs, fn=fn, running=running: fn(*inputs, running), [x, residual], dy)
        outcomes.append((y, *grads, *running))
    assert same_bits(*outcomes)


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
        ({"residual": torch.zeros(2, 3, 5, 6)}, r"larger by the same even number, for a margin that is cropped"),
        ({"residual": torch.zeros(2, 3, 2, 3)}, r"residual has shape \(2, 3, 2, 3\), expected x's"),
        ({"residual": torch.zeros(2, 4, 4, 5)}, r"residual has shape \(2, 4, 4, 5\), expected x's"),
        ({"residual": torch.zeros(2, 3, 4, 5, dtype=torch.bool)}, r"residual is torch.bool, expected a floating type"),
        ({"running_mean": torch.zeros(4)}, r"running_mean has shape \(4,\), expected \(3,\): x is \(2, 3, 4, 5\)"),
        ({"running_var": torch.zeros(3, dtype=torch.int32)}, r"running_var is torch.int32, expected a floating type"),
        ({"running_var": torch.zeros(3, device="meta")}, r"running_var is on meta, x on cpu"),
        ({"x": torch.zeros(1, 3, 1, 1)}, r"x has shape \(1, 3, 1, 1\): training needs more than one value per channel"),
    ],
)
def test_norm_refuses_bad_input(change, message):
    good = {"x": torch.zeros(2, 3, 4, 5), "weight": torch.ones(3), "bias": torch.zeros(3)}
    running = {"running_mean": torch.ones(3), "running_var": torch.ones(3), "training": True}
    check_bad_input(batch_norm, good | running | change, message)
    if "running" not in message and "training" not in message:
        check_bad_input(instance_norm, good | change, message)


def test_instance_norm_of_a_large_image_has_accurate_statistics() -> None:
    """Naive sums of fp32 over two million positions miss a variance by a thousandth."""
    x = 2 * torch.randn(1, 1500, 1500, 4, generator=torch.Generator().manual_seed(0)).permute(0, 3, 1, 2) + 1
    y = instance_norm(x, torch.ones(4), torch.zeros(4), eps=0.0).double()
    assert y.mean((0, 2, 3)).abs().max() < 1e-6
    assert (y.square().mean((0, 2, 3)) - 1).abs().max() < 1e-4
