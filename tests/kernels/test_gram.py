"""Gram matrices and the style loss in every tier: against PyTorch and fp64."""

import pytest
import torch
from kernel_cases import DTYPES, LAYOUTS, check_bad_input, gradients, randn, same_format, spread_like
from tolerances import assert_as_exact_as_torch

from fastnst_kernels import gram_matrix, gram_matrix_reference, runtime, style_loss, style_loss_reference

# One position; C = 3, 17 and 32, and one that takes two tiles with a remainder; primes; more positions than a chunk.
SHAPES = [(2, 3, 7, 11), (1, 17, 5, 13), (2, 32, 13, 19), (3, 5, 1, 1), (1, 67, 3, 5)]
CASES = [("channels_last", shape) for shape in SHAPES] + [(layout, SHAPES[0]) for layout in LAYOUTS]


def torch_gram(features):
    """As a PyTorch user writes it, in the features' dtype."""
    f = features.flatten(2)
    return torch.bmm(f, f.mT) / f[0].numel()


def torch_style_loss(features, target):
    return (torch_gram(features) - target.to(features.dtype)).square().sum((1, 2))


def check(fn, peer, truth, inputs, dy, dtype):
    """Result and gradients against fp64, relative to PyTorch's own error; returns the gradients."""
    y, grads = gradients(fn, inputs, dy)
    peer_y, peer_grads = gradients(peer, inputs, dy)
    true_y, true_grads = gradients(truth, inputs, dy, torch.float64)
    assert y.dtype == torch.float32
    assert_as_exact_as_torch(y, peer_y, true_y, dtype=dtype, what="y")
    for number, three in enumerate(zip(grads, peer_grads, true_grads, strict=True)):
        assert_as_exact_as_torch(*three, dtype=dtype, what=f"gradient {number}")
    return grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "shape"), list(dict.fromkeys(CASES)), ids=str)
def test_gram_agrees_with_torch(tier, dtype, layout, shape):
    features = LAYOUTS[layout](randn(shape, dtype, tier.device))
    # An asymmetric gradient, exact in every dtype: both factors of FᵀF must get their share.
    dy = randn((shape[0], shape[1], shape[1]), torch.bfloat16, tier.device, seed=9).float()
    (d_features,) = check(gram_matrix, torch_gram, gram_matrix_reference, [features], dy, dtype)
    assert d_features.dtype == dtype
    assert same_format(d_features, features)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "shape"), list(dict.fromkeys(CASES)), ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["one_target", "target_per_sample"])
def test_style_loss_agrees_with_torch(tier, dtype, layout, shape, shared):
    n, c = shape[:2]
    features = LAYOUTS[layout](randn(shape, dtype, tier.device))
    # Not symmetric either, though a Gram matrix would be.
    target = randn((c, c) if shared else (n, c, c), torch.bfloat16, tier.device, seed=4).float() / 16
    dy = randn((n,), torch.bfloat16, tier.device, seed=9).float()
    grads = check(style_loss, torch_style_loss, style_loss_reference, [features, target], dy, dtype)
    assert grads[0].dtype == dtype


@pytest.mark.parametrize("programs", [1, 3, 512])
def test_any_split_of_the_positions(tier, programs, monkeypatch):
    monkeypatch.setattr(runtime, "TARGET_PROGRAMS", programs)
    features = LAYOUTS["channels_last"](randn((1, 5, 17, 19), torch.float32, tier.device))
    dy = randn((1, 5, 5), torch.float32, tier.device, seed=2)
    check(gram_matrix, torch_gram, gram_matrix_reference, [features], dy, torch.float32)


def test_hand_computed(tier):
    """F = [[1, 2], [3, 4]] (channel × position), C·K = 4: G = [[5, 11], [11, 25]] / 4."""
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=tier.device).view(1, 2, 1, 2)
    assert gram_matrix(features).tolist() == [[[1.25, 2.75], [2.75, 6.25]]]
    target = torch.tensor([[1.25, 0.75], [2.75, 5.25]], device=tier.device)
    assert style_loss(features, target).tolist() == [2.0**2 + 1.0]


def test_fp16_features_do_not_overflow(tier):
    """Loss networks on the 0–255 scale reach thousands: squares and sums beyond fp16's 65504, gradients within it."""
    features = randn((1, 4, 16, 16), torch.float16, tier.device) * 8000
    leaf = features.requires_grad_()
    loss = style_loss(leaf, torch.zeros(4, 4, device=tier.device))
    (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 1e-8))
    assert loss.item() > 1e13
    zeros, dy = torch.zeros(4, 4, device=tier.device), torch.full((1,), 1e-8, device=tier.device)
    true_loss, (true_grad, _) = gradients(style_loss_reference, [features, zeros], dy, torch.float64)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=2e-3, atol=2e-3 * true_grad.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice(tier, dtype):
    features = LAYOUTS["channels_last"](randn((2, 17, 23, 29), dtype, tier.device))
    target, dy = torch.zeros(17, 17, device=tier.device), torch.ones(2, device=tier.device)
    first, second = (gradients(style_loss, [features, target], dy) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_gradients_of_any_layout_twice(tier):
    features = LAYOUTS["channels_last"](randn((2, 5, 4, 3), torch.float32, tier.device)).requires_grad_()
    gram = gram_matrix(features)
    for dy in (gram.detach().mT, spread_like(gram[:, None])[:, 0], torch.ones((), device=tier.device).expand_as(gram)):
        (got,) = torch.autograd.grad(gram, features, dy, retain_graph=True)
        (expected,) = torch.autograd.grad(gram_matrix_reference(features), features, dy)
        torch.testing.assert_close(got, expected)
    loss = style_loss(features, gram.detach() / 2)
    (got,) = torch.autograd.grad(loss, features, torch.ones((), device=tier.device).expand_as(loss))
    (expected,) = torch.autograd.grad(style_loss_reference(features, gram.detach() / 2).sum(), features)
    torch.testing.assert_close(got, expected)


def test_no_gradient_for_a_constant_target(tier):
    features = randn((1, 3, 4, 4), torch.float32, tier.device).requires_grad_()
    target = torch.eye(3, device=tier.device)
    style_loss(features, target).sum().backward()
    assert features.grad is not None
    assert target.grad is None


def test_registered_as_pytorch_demands(tier):
    features = LAYOUTS["channels_last"](randn((2, 3, 4, 5), torch.float32, tier.device)).requires_grad_()
    target = randn((3, 3), torch.float32, tier.device, seed=1).requires_grad_()
    torch.library.opcheck(torch.ops.fastnst.gram_matrix, (features,))
    torch.library.opcheck(torch.ops.fastnst.style_loss, (features, target))
    matrix, factor = (randn(s, torch.float32, tier.device, seed=2) for s in ((2, 3, 3), (2,)))
    for arguments in ((features.detach(), matrix, factor), (features.detach(), matrix, None)):
        torch.library.opcheck(torch.ops.fastnst.gram_backward, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout):
    features = LAYOUTS[layout](randn((2, 3, 2, 4), torch.float64)).requires_grad_()
    target = randn((3, 3), torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(gram_matrix, [features])
    assert torch.autograd.gradcheck(gram_matrix_reference, [features])
    assert torch.autograd.gradcheck(style_loss, [features, target])
    assert torch.autograd.gradcheck(style_loss_reference, [features, target])


def test_traced_in_one_graph():
    features, target = randn((2, 3, 4, 5)), randn((3, 3), seed=1)
    compiled = torch.compile(style_loss, backend="aot_eager", fullgraph=True)
    expected, actual = (gradients(fn, [features, target], torch.ones(2)) for fn in (style_loss, compiled))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1][0], expected[1][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(3, 4, 5)}, r"features has shape \(3, 4, 5\), expected 4 dimensions"),
        ({"features": torch.zeros(2, 3, 0, 5)}, r"it holds no elements"),
        ({"target_gram": torch.zeros(4, 4)}, r"target_gram has shape \(4, 4\), expected \(3, 3\) or \(2, 3, 3\)"),
        ({"target_gram": torch.zeros(1, 3, 3)}, r"target_gram has shape \(1, 3, 3\), expected \(3, 3\) or \(2, 3, 3\)"),
        (
            {"target_gram": torch.zeros(3, 3, dtype=torch.float16)},
            r"target_gram is torch.float16, expected torch.float32",
        ),
        ({"target_gram": torch.zeros(3, 3, device="meta")}, r"target_gram is on meta, features on cpu"),
    ],
)
def test_bad_input(change, message):
    check_bad_input(style_loss, {"features": torch.zeros(2, 3, 4, 5), "target_gram": torch.eye(3)} | change, message)


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_does_not_reach_the_sums(tier, autocast):
    features = randn((2, 5, 7, 9), torch.float32, tier.device) * 3000
    target, dy = torch.zeros(5, 5, device=tier.device), torch.ones(2, device=tier.device)
    plain = gradients(lambda f: style_loss(f, target), [features], dy)
    with torch.autocast(tier.device.type, dtype=autocast):
        under = gradients(lambda f: style_loss(f, target), [features], dy)
    assert torch.equal(under[0], plain[0])
    assert torch.equal(under[1][0], plain[1][0])
