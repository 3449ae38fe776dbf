"""Pooling with switches and its adjoint in every tier: PyTorch's exact values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from fastnst_kernels import (
    max_pool2d_switches,
    max_pool2d_switches_reference,
    max_unpool2d_switches,
    max_unpool2d_switches_reference,
)
from fastnst_kernels.pool import kernels as max_pool_kernels
from fastnst_kernels.pool.max_pool import _plane_index, gather_switches_reference
from helpers.kernels.kernel_cases import (
    LAYOUTS,
    check_bad_input,
    check_op,
    gradients,
    randn,
    same_format,
    spread_like,
    switches_of_torch,
    with_dtypes,
)
from helpers.tolerances import assert_as_exact_as_torch

# (shape, window, stride): even and odd sides, overlap, gaps between windows, one window, the largest window, stride 1.
CASES = [
    ("channels_last", (2, 3, 6, 8), 2, 2),
    ("channels_last", (1, 17, 7, 11), 2, 2),
    ("channels_last", (2, 32, 5, 6), 3, 2),
    ("channels_last", (2, 5, 9, 8), 2, 3),
    ("channels_last", (3, 4, 2, 3), 2, 2),
    ("channels_last", (1, 2, 17, 16), 16, 16),
    ("channels_last", (1, 1, 6, 5), 3, 1),
    ("contiguous", (2, 3, 7, 8), 2, 2),
    ("contiguous", (1, 3, 6, 7), 3, 2),
]
every_case = pytest.mark.parametrize(("layout", "shape", "kernel_size", "stride", "dtype"), with_dtypes(CASES), ids=str)


def torch_unpool(y, switches, size, kernel_size, stride):
    """`fold` of one-hot windows; it needs windows that reach the border, so the rest is padded."""
    n, c = y.shape[:2]
    hot = F.one_hot(switches.long(), kernel_size**2).to(y.dtype) * y[..., None]
    columns = hot.flatten(2, 3).permute(0, 1, 3, 2).reshape(n, c * kernel_size**2, -1)
    covered = [(side - 1) * stride + kernel_size for side in y.shape[2:]]
    inner = F.fold(columns, covered, kernel_size, stride=stride)
    return F.pad(inner, (0, size[1] - covered[1], 0, size[0] - covered[0]))


@every_case
def test_max_pool_values_and_switches_are_torchs(tier, layout, shape, kernel_size, stride, dtype):
    x = LAYOUTS[layout](randn(shape, dtype, tier.device))
    y, switches = max_pool2d_switches(x, kernel_size, stride)
    expected_y, expected_switches = switches_of_torch(x, kernel_size, stride)
    assert switches.dtype == torch.uint8
    assert torch.equal(y, expected_y)
    assert torch.equal(switches, expected_switches)
    assert same_format(y, x)
    assert same_format(switches, x)


@every_case
def test_max_pool_gradient_is_torchs(tier, layout, shape, kernel_size, stride, dtype):
    x = LAYOUTS[layout](randn(shape, dtype, tier.device))
    dy = randn(switches_of_torch(x, kernel_size, stride)[0].shape, dtype, tier.device, seed=5)

    def torch_pool(x):
        return F.max_pool2d(x, kernel_size, stride)

    _, (actual,) = gradients(lambda x: max_pool2d_switches(x, kernel_size, stride)[0], [x], dy)
    _, (peer,) = gradients(torch_pool, [x], dy)
    _, (truth,) = gradients(torch_pool, [x], dy, torch.float64)
    assert_as_exact_as_torch(actual, peer, truth, what="dx")
    assert same_format(actual, x)


@every_case
def test_max_unpool_and_its_gradient(tier, layout, shape, kernel_size, stride, dtype):
    x = LAYOUTS[layout](randn(shape, dtype, tier.device))
    y, switches = max_pool2d_switches(x, kernel_size, stride)
    window, size = (kernel_size, stride), tuple(shape[2:])
    dx = randn(shape, dtype, tier.device, seed=7)

    def run(fn, dtype=None):
        return gradients(lambda y: fn(y, switches, size, *window), [y], dx, dtype)

    actual, (d_actual,) = run(max_unpool2d_switches)
    peer, (d_peer,) = run(max_unpool2d_switches_reference)
    truth, (d_truth,) = run(torch_unpool, torch.float64)
    assert_as_exact_as_torch(actual, peer, truth, what="x")
    assert_as_exact_as_torch(d_actual, d_peer, d_truth, what="dy")
    assert same_format(actual, y)
    assert same_format(d_actual, y)


def test_max_pool_takes_the_first_of_equals(tier):
    """Ties, an all-equal window, −∞ throughout: the first in row-major order."""
    inf = float("inf")
    rows = [[1, 1, 0, 2, 3, 3, -inf, -inf], [1, 1, 2, 2, 3, 3, -inf, -inf]]
    y, switches = max_pool2d_switches(torch.tensor(rows, device=tier.device).view(1, 1, 2, 8))
    assert y.flatten().tolist() == [1, 2, 3, -inf]
    assert switches.flatten().tolist() == [0, 1, 0, 0]


def test_max_unpool_by_hand(tier):
    """Windows of 2 with stride 1 on a row of 3: both point at the middle, so their values add."""
    switches = torch.tensor([[1, 0]], dtype=torch.uint8, device=tier.device).view(1, 1, 1, 2)
    y = torch.tensor([[10.0, 5.0]], device=tier.device).view(1, 1, 1, 2)
    x = max_unpool2d_switches(y, switches, (2, 3), kernel_size=2, stride=1)
    assert x.squeeze().tolist() == [[0, 15, 0], [0, 0, 0]]


def test_max_unpool_is_the_adjoint_of_gather(tier):
    """⟨S x, y⟩ = ⟨x, Sᵀy⟩ for any x, y and switches."""
    x, y = randn((2, 3, 7, 9), torch.float32, tier.device), randn((2, 3, 3, 4), torch.float32, tier.device, seed=1)
    switches = torch.randint(9, y.shape, generator=torch.Generator().manual_seed(2)).to(tier.device, torch.uint8)
    left = (torch.ops.fastnst.gather_switches(x, switches, 3, 2).double() * y.double()).sum()
    right = (x.double() * max_unpool2d_switches(y, switches, (7, 9), 3, 2).double()).sum()
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def test_max_unpool_takes_switches_in_another_format(tier):
    y = LAYOUTS["channels_last"](randn((2, 3, 2, 4), torch.float32, tier.device))
    switches = torch.randint(4, y.shape, generator=torch.Generator().manual_seed(2)).to(tier.device, torch.uint8)
    assert switches.is_contiguous()
    expected = max_unpool2d_switches_reference(y, switches, (4, 8))
    assert torch.equal(max_unpool2d_switches(y, switches, (4, 8)), expected)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
def test_max_pool_backward_takes_a_gradient_of_any_layout(tier, layout):
    x = LAYOUTS["channels_last"](randn((2, 5, 6, 8), torch.float32, tier.device)).requires_grad_()
    y = max_pool2d_switches(x)[0]
    dy = spread_like(y) if layout == "expanded" else LAYOUTS[layout](randn(y.shape, y.dtype, tier.device, seed=3))
    (expected,) = torch.autograd.grad(F.max_pool2d(x, 2), x, dy)
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(y, x, dy, retain_graph=True)[0], expected)


def test_max_pool_second_derivative(tier):
    """The gradient with respect to dy of the gradient is the pooling's own selection."""
    x = randn((1, 2, 4, 6), torch.float32, tier.device).requires_grad_()
    y, switches = max_pool2d_switches(x)
    dy = randn(y.shape, y.dtype, tier.device, seed=1).requires_grad_()
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    other = randn(x.shape, x.dtype, tier.device, seed=2)
    (back,) = torch.autograd.grad(dx, dy, other)
    assert torch.equal(back, gather_switches_reference(other, switches))


@pytest.mark.parametrize(("kernel_size", "stride"), [(2, 2), (3, 1)])
def test_max_pool_gives_the_same_bits_twice(tier, kernel_size, stride):
    x = randn((1, 3, 6, 7), torch.float32, tier.device)
    dy = randn(switches_of_torch(x, kernel_size, stride)[0].shape, torch.float32, tier.device, seed=1)
    first, second = (gradients(lambda x: max_pool2d_switches(x, kernel_size, stride)[0], [x], dy) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1][0], second[1][0])


@pytest.mark.parametrize(("kernel_size", "stride"), [(2, 2), (3, 2)])
def test_pool_ops_pass_opcheck(tier, kernel_size, stride):
    x = LAYOUTS["channels_last"](randn((2, 3, 7, 8), torch.float32, tier.device)).requires_grad_()
    check_op(torch.ops.fastnst.max_pool2d_switches, (x, kernel_size, stride), tier)
    y, switches = (t.detach() for t in max_pool2d_switches(x, kernel_size, stride))
    unpool = (y.requires_grad_(), switches, 7, 8, kernel_size, stride)
    check_op(torch.ops.fastnst.max_unpool2d_switches, unpool, tier)
    check_op(torch.ops.fastnst.gather_switches, (x, switches, kernel_size, stride), tier)


def test_pool_gradcheck():
    x = randn((1, 2, 5, 6), torch.float64).requires_grad_()
    switches = max_pool2d_switches(x, 3, 2)[1]
    y = randn(switches.shape, torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: max_pool2d_switches(x, 3, 2)[0], [x])
    assert torch.autograd.gradcheck(lambda x: max_pool2d_switches_reference(x, 3, 2)[0], [x])
    for fn in (max_unpool2d_switches, max_unpool2d_switches_reference):
        assert torch.autograd.gradcheck(lambda y, fn=fn: fn(y, switches, (5, 6), 3, 2), [y])
    assert torch.autograd.gradgradcheck(lambda x: max_pool2d_switches(x, 3, 2)[0], [x])
    assert torch.autograd.gradcheck(lambda x: gather_switches_reference(x, switches, 3, 2), [x])


def test_pool_and_unpool_compile_to_one_graph(tier):
    """Pool, unpool and both gradients, without a break."""
    x, dy = randn((2, 3, 5, 8), device=tier.device), randn((2, 3, 5, 8), device=tier.device, seed=1)

    def pool_and_back(x):
        y, switches = max_pool2d_switches(x)
        return max_unpool2d_switches(2 * y, switches, (5, 8))

    traced = torch.compile(pool_and_back, backend="aot_eager", fullgraph=True)
    expected, actual = (gradients(f, [x], dy) for f in (pool_and_back, traced))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1][0], expected[1][0])


OUT_OF_RANGE = r"switches reach {}, but a window of {}×{} has 0 to {}: pass what max_pool2d_switches returned"


@pytest.mark.parametrize(("kernel_size", "size", "switch"), [(2, (5, 6), 4), (2, (4, 6), 255), (3, (7, 9), 9)])
def test_max_unpool_refuses_switches_out_of_range(tier, monkeypatch, kernel_size, size, switch):
    """An error, except on a GPU, which would have to be waited for, unless that is asked for."""
    switches = torch.zeros((1, 3, 2, 3), dtype=torch.uint8, device=tier.device)
    switches[0, 1, 1, 2] = switch
    y = torch.ones(switches.shape, device=tier.device)
    stride = size[0] // 2
    if tier.device.type == "cuda":
        dropped = max_unpool2d_switches(y, switches, size, kernel_size, stride)
        assert dropped.sum() == y.numel() - 1
        monkeypatch.setenv("FASTNST_KERNELS_CHECK", "1")
    message = OUT_OF_RANGE.format(switch, kernel_size, kernel_size, kernel_size**2 - 1)
    with pytest.raises(ValueError, match=message):
        max_unpool2d_switches(y, switches, size, kernel_size, stride)
    with pytest.raises(ValueError, match=message):
        torch.ops.fastnst.gather_switches(torch.ones((1, 3, *size), device=tier.device), switches, kernel_size, stride)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("kernel_size", "stride"), [(2, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("tier", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_pool_kernels_drop_switches_out_of_range(tier, layout, kernel_size, stride):
    """The value of any byte out of range is dropped, or 0 is gathered.

    x is inside a larger tensor of NaN, which must be neither read nor written.
    """
    shape = (1, 5, 6, 7)
    y_shape = (1, 5, (6 - kernel_size) // stride + 1, (7 - kernel_size) // stride + 1)
    switches = torch.arange(5 * y_shape[2] * y_shape[3]) * 7 % 256
    switches = LAYOUTS[layout](switches.view(y_shape).to(tier.device, torch.uint8))
    y = LAYOUTS[layout](randn(y_shape, torch.float32, tier.device))
    sides = (1, 6, 7, 5) if layout == "channels_last" else shape
    around = torch.full((3, *sides), float("nan"), device=tier.device)
    x = around[1].permute(0, 3, 1, 2) if layout == "channels_last" else around[1]
    max_pool_kernels.unpool(y, switches, x, kernel_size, stride)
    in_range = switches < kernel_size**2
    assert not in_range.all()
    expected = max_unpool2d_switches_reference(y * in_range, switches * in_range, shape[2:], kernel_size, stride)
    assert torch.equal(x, expected)
    assert around[::2].isnan().all()
    picked = torch.full_like(y, float("nan"))
    max_pool_kernels.gather(x, switches, picked, kernel_size, stride)
    assert torch.equal(picked, gather_switches_reference(x, switches * in_range, kernel_size, stride) * in_range)


def test_plane_index_beyond_32_bits():
    """PyTorch's path finds windows beyond 2³¹ positions, too: the last of a tall column of pairs."""
    switches = torch.tensor([2, 3], dtype=torch.uint8).repeat(2**14).view(1, 1, 2**15, 1)
    index = _plane_index(switches, 2**17, 2, 2)
    assert index[0, 0, -2:, 0].tolist() == [(2 * (2**15 - 2) + 1) * 2**17, (2 * (2**15 - 1) + 1) * 2**17 + 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 5)}, r"x has shape \(3, 4, 5\), expected 4 dimensions"),
        ({"x": torch.zeros(0, 3, 4, 5)}, r"x has shape \(0, 3, 4, 5\): it holds no elements"),
        ({"x": torch.zeros(1, 3, 4, 5, dtype=torch.int32)}, r"x is torch.int32, expected float32"),
        ({"x": torch.zeros(1, 3, 1, 5)}, r"x has shape \(1, 3, 1, 5\): a window of 2 does not fit"),
        ({"kernel_size": 17}, r"kernel_size is 17, expected 1 to 16: a switch must fit a byte"),
        ({"kernel_size": 0}, r"kernel_size is 0, expected 1 to 16"),
        ({"stride": 0}, r"stride is 0, expected at least 1"),
    ],
)
def test_max_pool_refuses_bad_input(change, message):
    check_bad_input(max_pool2d_switches, {"x": torch.zeros(1, 3, 4, 5)} | change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(2, 2)}, r"y has shape \(2, 2\), expected 4 dimensions"),
        (
            {"switches": torch.zeros(1, 3, 2, 3, dtype=torch.uint8)},
            r"switches have shape \(1, 3, 2, 3\), expected y's \(1, 3, 2, 2\)",
        ),
        ({"switches": torch.zeros(1, 3, 2, 2, dtype=torch.int64)}, r"switches are torch.int64, expected torch.uint8"),
        ({"switches": torch.zeros(1, 3, 2, 2, dtype=torch.uint8, device="meta")}, r"switches is on meta, y on cpu"),
        ({"y": torch.zeros(1, 3, 0, 2)}, r"y has shape \(1, 3, 0, 2\): it holds no elements"),
        ({"y": torch.zeros(1, 3, 2, 2, dtype=torch.int32)}, r"y is torch.int32, expected float32"),
        ({"output_size": (4, 5, 1)}, r"output_size is \(4, 5, 1\), expected \(height, width\)"),
        (
            {"output_size": (4, 6)},
            r"output_size \(4, 6\) with window 2 and stride 2 pools to \(2, 3\), but y has shape",
        ),
    ],
)
def test_max_unpool_refuses_bad_input(change, message):
    good = {"y": torch.zeros(1, 3, 2, 2), "switches": torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "output_size": (4, 5)}
    check_bad_input(max_unpool2d_switches, good | change, message)
