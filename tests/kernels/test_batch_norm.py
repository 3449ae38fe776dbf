"""Batch normalisation in every tier: against PyTorch and fp64, running statistics included."""

import pytest
import torch
import torch.nn.functional as F

from fastnst_kernels import batch_norm, batch_norm_reference, runtime
from fastnst_kernels.norm import dispatch
from helpers.kernel_cases import DTYPES, LAYOUTS, check_bad_input, gradients, parameters, randn, same_format
from helpers.tolerances import assert_as_exact_as_torch

SHAPES = [(2, 3, 7, 11), (1, 17, 5, 13), (2, 32, 13, 19), (3, 5, 2, 1), (4, 3, 1, 1)]
CASES = [("channels_last", shape) for shape in SHAPES] + [(layout, SHAPES[0]) for layout in LAYOUTS]
VARIANTS = [(False, False), (False, True), (True, False), (True, True)]
UNPLACED = (1, [0, 0, 0, 0], "reflect")  # the op's own arguments: no enlargement, no border
# A residual's border and where the result goes.
PLACEMENTS = [(0, {}), (1, {"upsample": 2, "padding": (1, 2, 0, 3)}), (2, {"padding": 1, "padding_mode": "zeros"})]


def torch_batch_norm(x, weight, bias, running_mean, running_var, *, training, momentum=0.1, eps=1e-5, residual=None,
                     relu=False):  # fmt: skip
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    mean, var = running_mean.to(x.dtype, copy=True), running_var.to(x.dtype, copy=True)
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    running_mean.copy_(mean)
    running_var.copy_(var)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def running_statistics(channels, device, dtype=torch.float32):
    return randn((channels,), torch.bfloat16, device, seed=31).to(dtype), torch.full((channels,), 1.5, device=device)


def check(tier, x, *, training, conditioning=0.0, residual=None, fn=batch_norm, **options):
    """Result, gradients, running statistics against fp64, relative to PyTorch's own error; returns (y, gradients)."""
    channels = x.shape[1]
    dy = randn(x.shape, x.dtype, tier.device, seed=99)
    inputs = [x, *parameters(channels, tier.device)] + ([] if residual is None else [residual])

    def run(fn, dtype=None):
        running = [t if dtype is None else t.to(dtype) for t in running_statistics(channels, tier.device)]

        def call(x, weight, bias, residual=None):
            return fn(x, weight, bias, *running, training=training, residual=residual, **options)

        return *gradients(call, inputs, dy, dtype), running

    y, grads, running = run(fn)
    peer_y, peer_grads, peer_running = run(torch_batch_norm)
    true_y, true_grads, true_running = run(batch_norm_reference, torch.float64)
    assert y.dtype == x.dtype
    assert_as_exact_as_torch(y, peer_y, true_y, conditioning=conditioning, what="y")
    for name, *three in zip(("dx", "d_weight", "d_bias", "d_residual"), grads, peer_grads, true_grads, strict=False):
        terms = x[:, 0].numel() if name in ("d_weight", "d_bias") else 0
        assert_as_exact_as_torch(*three, dtype=x.dtype, conditioning=conditioning + terms**0.5, what=name)
    for name, *three in zip(("running_mean", "running_var"), running, peer_running, true_running, strict=True):
        assert_as_exact_as_torch(*three, conditioning=conditioning, what=name)
    return y, grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "shape"), list(dict.fromkeys(CASES)), ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_agrees_with_torch(tier, dtype, layout, shape, training):
    x = LAYOUTS[layout](randn(shape, dtype, tier.device))
    y, grads = check(tier, x, training=training)
    assert same_format(y, x)
    assert same_format(grads[0], x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("with_residual", "relu"), VARIANTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_residual_and_relu(tier, dtype, with_residual, relu, training):
    x = LAYOUTS["channels_last"](randn((2, 17, 5, 7), dtype, tier.device))
    residual = randn(x.shape, dtype, tier.device, seed=5) if with_residual else None
    y, _ = check(tier, x, training=training, residual=residual, relu=relu)
    assert (y.min() >= 0) == relu


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("programs", [1, 4, 512])
def test_any_split_of_the_rows(tier, layout, programs, monkeypatch):
    """In contiguous format the chunks of several samples make one channel; the last chunk of each is a short one."""
    monkeypatch.setattr(runtime, "TARGET_PROGRAMS", programs)
    monkeypatch.setattr(dispatch, "_TILE_ELEMENTS", 32)
    monkeypatch.setattr(dispatch, "_MERGE_ROWS", 2)
    check(tier, LAYOUTS[layout](randn((2, 3, 11, 9), torch.float32, tier.device) + 3), training=True, relu=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mean_that_dwarfs_the_deviation(tier, layout):
    """E[x²] − E[x]² would lose every digit here."""
    x = LAYOUTS[layout](randn((2, 8, 33, 31), torch.float32, tier.device) + 1e4)
    check(tier, x, training=True, conditioning=1e4)


def test_hand_computed(tier):
    """Values 1 and 3, twice each: μ = 2, σ² = 1, unbiased 4/3; ε = 3 halves the deviations."""
    x = torch.tensor([1.0, 3.0, 1.0, 3.0], device=tier.device).view(2, 1, 1, 2)
    one = torch.ones(1, device=tier.device)
    mean, var = 10 * one, 1 * one
    y = batch_norm(x, 4 * one, 0.5 * one, mean, var, training=True, momentum=0.25, eps=3.0)
    assert y.flatten().tolist() == [-1.5, 2.5, -1.5, 2.5]
    assert mean.item() == 8
    assert var.item() == pytest.approx(0.75 + 0.25 * 4 / 3)
    y = batch_norm(x, 4 * one, 0.5 * one, torch.ones_like(one), one, training=False, eps=3.0)
    assert y.flatten().tolist() == [0.5, 4.5, 0.5, 4.5]


def test_inference_leaves_the_running_statistics(tier):
    mean, var = running_statistics(3, tier.device)
    before = mean.clone(), var.clone()
    batch_norm(randn((2, 3, 4, 5), device=tier.device), *parameters(3, tier.device), mean, var, training=False)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


def test_agrees_with_a_module_over_steps(tier):
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice(tier, dtype):
    x = LAYOUTS["channels_last"](randn((2, 17, 23, 29), dtype, tier.device))
    dy = randn(x.shape, dtype, tier.device, seed=3)

    def run():
        running = running_statistics(17, tier.device)
        y, grads = gradients(lambda *a: batch_norm(*a, *running, training=True), [x, *parameters(17, tier.device)], dy)
        return y, *grads, *running

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_backward_twice_with_an_expanded_gradient(tier):
    x = LAYOUTS["channels_last"](randn((2, 3, 5, 7), device=tier.device)).requires_grad_()
    y = batch_norm(x, *parameters(3, tier.device), *running_statistics(3, tier.device), training=True, relu=True)
    expected_y = batch_norm_reference(
        x, *parameters(3, tier.device), *running_statistics(3, tier.device), training=True, relu=True
    )
    dy = randn((2, 1, 1, 7), device=tier.device, seed=4).expand_as(y)
    (expected,) = torch.autograd.grad(expected_y, x, dy)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(y, x, dy, retain_graph=True)[0], expected)


def test_under_autocast(tier):
    """A convolution hands over bfloat16; parameters, their gradients and the running statistics stay fp32."""
    weight, bias = (p.requires_grad_() for p in parameters(4, tier.device))
    mean, var = running_statistics(4, tier.device)
    with torch.autocast(tier.device.type, torch.bfloat16):
        x = F.conv2d(randn((1, 3, 8, 8), device=tier.device), randn((4, 3, 3, 3), device=tier.device))
        y = batch_norm(x, weight, bias, mean, var, training=True, relu=True)
    assert x.dtype == y.dtype == torch.bfloat16
    y.backward(randn(y.shape, y.dtype, tier.device))
    assert weight.grad is not None
    assert weight.grad.dtype == mean.dtype == torch.float32


@pytest.mark.parametrize(
    ("training", "border", "wanted", "place"),
    [(False, 0, -1, UNPLACED), (True, 1, 1, (2, [1, 0, 0, 1], "symmetric"))],
)
def test_registered_as_pytorch_demands(tier, training, border, wanted, place):
    x = LAYOUTS["channels_last"](randn((1, 3, 3, 2), device=tier.device)).requires_grad_()
    weight, bias = (p.requires_grad_() for p in parameters(3, tier.device))
    residual = randn((1, 3, 3 + 2 * border, 2 + 2 * border), x.dtype, tier.device, seed=2).requires_grad_()
    ops = torch.ops.fastnst
    constants = [] if training else list(running_statistics(3, tier.device))
    torch.library.opcheck(ops.batch_norm, (x, weight, bias, constants, residual, 1e-5, True, *place))
    with torch.no_grad():
        y, *statistics = ops.batch_norm(x, weight, bias, constants, residual, 1e-5, True, *place)
    assert all(t.numel() == (3 if training else 0) for t in statistics)
    saved = [x, weight, bias, *(constants or statistics[:2]), residual, y]
    arguments = [t.detach() for t in (randn(y.shape, device=tier.device), *saved)]
    torch.library.opcheck(ops.batch_norm_backward, (*arguments, not training, True, *place, wanted))


@pytest.mark.parametrize("fn", [batch_norm, batch_norm_reference])
@pytest.mark.parametrize(("with_residual", "relu"), VARIANTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("border", "place"), PLACEMENTS)
def test_gradcheck(fn, with_residual, relu, training, border, place):
    x = randn((2, 3, 3, 4), torch.float64, seed=1).requires_grad_()
    residual = randn((2, 3, 3 + 2 * border, 4 + 2 * border), torch.float64, seed=2).requires_grad_()
    weight, bias = (p.double().requires_grad_() for p in parameters(3))

    def call(x, weight, bias, residual=None):
        running = (t.double() for t in running_statistics(3, "cpu"))
        return fn(x, weight, bias, *running, training=training, residual=residual, relu=relu, **place)

    assert torch.autograd.gradcheck(call, [x, weight, bias, residual] if with_residual else [x, weight, bias])


@pytest.mark.parametrize(("border", "place"), PLACEMENTS)
def test_traced_in_one_graph_with_its_mutation(border, place):
    x = randn((2, 3, 5, 7))
    residual = randn((2, 3, 5 + 2 * border, 7 + 2 * border), seed=2)
    weight, bias = parameters(3)

    def run(x, residual, mean, var):
        return batch_norm(x, weight, bias, mean, var, training=True, residual=residual, relu=True, **place)

    dy = randn(run(x, residual, *running_statistics(3, "cpu")).shape, seed=1)
    outcomes = []
    for fn in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        running = running_statistics(3, "cpu")
        y, grads = gradients(lambda *inputs, fn=fn, running=running: fn(*inputs, *running), [x, residual], dy)
        outcomes.append((y, *grads, *running))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x has shape \(3, 4\), expected 4 dimensions"),
        ({"running_mean": torch.zeros(4)}, r"running_mean has shape \(4,\), expected \(3,\): x is \(2, 3, 4, 5\)"),
        ({"running_var": torch.zeros(3, dtype=torch.int32)}, r"running_var is torch.int32, expected a floating type"),
        ({"running_var": torch.zeros(3, device="meta")}, r"running_var is on meta, x on cpu"),
        ({"residual": torch.zeros(2, 3, 4, 5, dtype=torch.bool)}, r"residual is torch.bool, expected a floating type"),
        ({"x": torch.zeros(1, 3, 1, 1)}, r"x has shape \(1, 3, 1, 1\): training needs more than one value per channel"),
    ],
)
def test_bad_input(change, message):
    good = {"x": torch.zeros(2, 3, 4, 5), "training": True}
    good |= {name: torch.ones(3) for name in ("weight", "bias", "running_mean", "running_var")}
    check_bad_input(batch_norm, good | change, message)
