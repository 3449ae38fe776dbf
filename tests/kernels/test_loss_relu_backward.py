"""The gradient at a layer with losses in every tier: against PyTorch, its autograd and fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastnst_kernels import (
    StyleMatrix,
    loss_relu_backward,
    loss_relu_backward_reference,
    style_loss_and_matrix,
    style_loss_reference,
)
from fastnst_kernels.gram.style_loss import style_matrix_reference
from helpers.kernel_cases import DTYPES, LAYOUTS, check_bad_input, check_op, randn, same_format
from helpers.tolerances import assert_as_exact_as_torch

SHAPES = [(2, 3, 7, 11), (1, 17, 5, 13), (2, 32, 13, 9), (3, 5, 1, 1), (1, 72, 4, 6), (1, 136, 8, 3), (1, 512, 1, 2)]
TERMS = [terms for count in (1, 2, 3) for terms in itertools.combinations(("incoming", "style", "content"), count)]
# Every shape with every mix of terms, in one dtype; all terms in every dtype.
CASES = [(shape, terms, DTYPES[(i + j) % 3]) for i, shape in enumerate(SHAPES) for j, terms in enumerate(TERMS)]
CASES += [case for case in itertools.product(SHAPES, TERMS[-1:], DTYPES) if case not in CASES]


def arguments_of(terms, shape, dtype, device, layout="channels_last"):
    """Features after a ReLU and the terms' arguments; D is asymmetric and exact in the features' type."""
    n, c = shape[:2]
    features = LAYOUTS[layout](randn(shape, dtype, device)).relu()
    factor = torch.tensor([0.5, -2.0, 3.0], device=device)[:n]
    arguments = {}
    if "incoming" in terms:
        arguments["incoming"] = LAYOUTS[layout](randn(shape, dtype, device, seed=1))
    if "style" in terms:
        difference = randn((n, c, c), torch.float32, device, seed=2).mul(8).round() * 4
        arguments["style_matrix"] = style_matrix_reference(difference, dtype)
        arguments["style_factor"] = factor
    if "content" in terms:
        arguments["content_target"] = LAYOUTS[layout](randn(shape, dtype, device, seed=3))
        arguments["content_factor"] = factor.flip(0)
    return features, arguments


def cast(arguments, dtype):
    """All but the factors in `dtype`; fp64 takes the factors along."""
    wide = dtype if dtype == torch.float64 else torch.float32

    def to(name, value):
        if isinstance(value, StyleMatrix):
            return StyleMatrix(value.values.to(dtype), value.scale.to(wide))
        return value.to(wide if name.endswith("factor") else dtype)

    return {name: to(name, value) for name, value in arguments.items()}


def by_torch(features, incoming=None, style_matrix=None, style_factor=None, content_target=None, content_factor=None):
    """As a PyTorch user writes it, in the features' dtype."""
    total = torch.zeros_like(features) if incoming is None else incoming
    if style_matrix is not None:
        scale = (style_matrix.scale * style_factor / features[0].numel()).view(-1, 1, 1)
        product = torch.bmm(style_matrix.values.mT, features.flatten(2)) * scale
        total = total + product.to(features.dtype).view_as(features)
    if content_target is not None:
        difference = (features - content_target) * content_factor.view(-1, 1, 1, 1)
        total = total + difference.to(features.dtype)
    return torch.ops.aten.threshold_backward(total, features, 0)


def check(features, arguments):
    y = loss_relu_backward(features, **arguments)
    truth = loss_relu_backward_reference(features.double(), **cast(arguments, torch.float64))
    assert_as_exact_as_torch(y, by_torch(features, **arguments), truth)
    assert y.dtype == features.dtype
    assert same_format(y, features)
    return y


@pytest.mark.parametrize(("shape", "terms", "dtype"), CASES, ids=str)
def test_loss_relu_backward_agrees_with_torch(tier, shape, terms, dtype):
    check(*arguments_of(terms, shape, dtype, tier.device))


@pytest.mark.parametrize(("terms", "dtype"), [(TERMS[2], torch.float32), (TERMS[-1], torch.bfloat16)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4]], ids=str)
def test_loss_relu_backward_takes_any_layout(tier, shape, layout, terms, dtype):
    features, arguments = arguments_of(terms, shape, dtype, tier.device, layout)
    expected = check(features, arguments)
    # Each of the other operands may come in a format of its own.
    if "incoming" in arguments:
        arguments["incoming"] = LAYOUTS["sliced"](arguments["incoming"])
    if "content_target" in arguments:
        arguments["content_target"] = LAYOUTS["contiguous"](arguments["content_target"])
    assert torch.equal(loss_relu_backward(features, **arguments), expected)


def test_loss_relu_backward_by_hand(tier):
    """F = [[1, 2], [0, 4]] (channel × position), C·K = 4; D + Dᵀ = [[2, 4], [4, 8]].

    F as [K, C] times it: positions (1, 0) → (2, 4) and (2, 4) → (20, 40); by ¼·2: channels (1, 10), (2, 20).
    Content, 3·(F − 1): (0, 3), (−3, 9). Incoming 10. Sum: (11, 23), (9, 39), masked at F = 0.
    """
    features = torch.tensor([[1.0, 2.0], [0.0, 4.0]], device=tier.device).view(1, 2, 1, 2)
    matrix = StyleMatrix(
        torch.tensor([[[2.0, 4.0], [4.0, 8.0]]], device=tier.device), torch.ones(1, device=tier.device)
    )
    result = loss_relu_backward(
        features,
        incoming=torch.full_like(features, 10),
        style_matrix=matrix,
        style_factor=torch.tensor([2.0], device=tier.device),
        content_target=torch.ones_like(features),
        content_factor=torch.tensor([3.0], device=tier.device),
    )
    assert result.flatten().tolist() == [11.0, 23.0, 0.0, 39.0]


def test_loss_relu_backward_is_autograds_gradient(tier):
    """Through the ReLU of z: the layers above, a weighted style loss and a weighted content loss."""
    z = LAYOUTS["channels_last"](randn((2, 5, 6, 7), torch.float32, tier.device)).requires_grad_()
    target, content = randn((5, 5), torch.float32, tier.device, seed=1), randn((2, 5, 6, 7), device=tier.device, seed=2)
    above, weight = randn((2, 5, 6, 7), device=tier.device, seed=3), torch.tensor([0.3, 1.7], device=tier.device)
    features = F.relu(z)
    squares = (features - content).square().sum((1, 2, 3))
    loss = (features * above).sum() + (weight * style_loss_reference(features, target)).sum() + (squares * weight).sum()
    (expected,) = torch.autograd.grad(loss, z)
    _, matrix = style_loss_and_matrix(features, target)
    actual = loss_relu_backward(
        features,
        incoming=above,
        style_matrix=matrix,
        style_factor=2 * weight,
        content_target=content,
        content_factor=2 * weight,
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, which the interpreter multiplies with
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_relu_backward_masks_nan_and_inf_as_pytorch_does(tier, dtype):
    """Hidden where F ≤ 0, visible where F is positive or NaN; −0 is not positive."""
    nan, inf = float("nan"), float("inf")
    features = (
        torch.tensor([-1.0, -0.0, 0.0, 1.0, nan, inf], dtype=dtype, device=tier.device).repeat(4).view(1, 1, 4, 6)
    )
    incoming = torch.tensor([1.0, nan, inf, -inf], dtype=dtype, device=tier.device).view(1, 1, 4, 1).expand(1, 1, 4, 6)
    expected = torch.ops.aten.threshold_backward(incoming, features, 0)
    torch.testing.assert_close(
        loss_relu_backward(features, incoming=incoming), expected, rtol=0, atol=0, equal_nan=True
    )
    # With a style term of 0·F: the same mask, and NaN in the sum where F is NaN or Inf.
    zeros = StyleMatrix(torch.zeros(1, 1, 1, dtype=dtype, device=tier.device), torch.ones(1, device=tier.device))
    factor = torch.ones(1, device=tier.device)
    actual = loss_relu_backward(features, incoming=incoming, style_matrix=zeros, style_factor=factor)
    expected = torch.where(features.isfinite(), expected, nan)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_relu_backward_spreads_nan_over_its_position(tier, dtype):
    features = torch.ones((1, 3, 1, 2), dtype=dtype, device=tier.device)
    features[0, 0, 0, 0], features[0, 2, 0, 0] = float("nan"), -1.0
    matrix = style_matrix_reference(torch.eye(3, device=tier.device)[None], dtype)
    result = loss_relu_backward(features, style_matrix=matrix, style_factor=torch.ones(1, device=tier.device))
    assert result.isnan().flatten().tolist() == [True, False, True, False, False, False]
    assert result[0, 2, 0, 0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_relu_backward_gives_the_same_bits_twice(tier, dtype):
    features, arguments = arguments_of(TERMS[-1], (2, 17, 13, 11), dtype, tier.device)
    assert torch.equal(loss_relu_backward(features, **arguments), loss_relu_backward(features, **arguments))


def test_loss_relu_backward_passes_opcheck(tier):
    for terms, dtype in ((TERMS[-1], torch.float16), (TERMS[0], torch.float32), (TERMS[1], torch.bfloat16)):
        features, given = arguments_of(terms, (2, 3, 4, 5), dtype, tier.device)
        matrix = given.get("style_matrix") or (None, None)
        names = ("style_factor", "content_target", "content_factor")
        arguments = (features, given.get("incoming"), *matrix, *map(given.get, names))
        check_op(torch.ops.fastnst.loss_relu_backward, arguments, tier)


def test_loss_relu_backward_compiles_to_one_graph():
    features, arguments = arguments_of(TERMS[-1], (2, 3, 4, 5), torch.float32, "cpu")
    compiled = torch.compile(loss_relu_backward, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(features, **arguments), loss_relu_backward(features, **arguments))


def test_loss_relu_backward_ignores_autocast(tier):
    features, arguments = arguments_of(TERMS[-1], (2, 5, 7, 9), torch.float32, tier.device)
    plain = loss_relu_backward(features, **arguments)
    with torch.autocast(tier.device.type, dtype=torch.bfloat16):
        assert torch.equal(loss_relu_backward(features, **arguments), plain)


def test_loss_relu_backward_reference_gradcheck():
    """gradcheck's counterpart for a function that is a gradient itself: its own derivatives, in fp64."""
    features, arguments = arguments_of(TERMS[-1], (2, 3, 2, 4), torch.float32, "cpu")
    arguments = cast(arguments, torch.float64)
    terms = [arguments["incoming"], arguments["style_matrix"].values, arguments["content_target"]]

    def backward(incoming, values, content_target):
        matrix = StyleMatrix(values, arguments["style_matrix"].scale)
        terms = {"incoming": incoming, "style_matrix": matrix, "content_target": content_target}
        return loss_relu_backward_reference(features.double(), **arguments | terms)

    assert torch.autograd.gradcheck(backward, [term.requires_grad_() for term in terms])


GOOD = {
    "features": torch.zeros(2, 3, 4, 5),
    "incoming": torch.zeros(2, 3, 4, 5),
    "style_matrix": StyleMatrix(torch.zeros(2, 3, 3), torch.ones(2)),
    "style_factor": torch.ones(2),
    "content_target": torch.zeros(2, 3, 4, 5),
    "content_factor": torch.ones(2),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(3, 4, 5)}, r"features has shape \(3, 4, 5\), expected 4 dimensions"),
        ({"features": torch.zeros(2, 3, 0, 5)}, r"features has shape \(2, 3, 0, 5\): it holds no elements"),
        ({"features": torch.zeros(2, 3, 4, 5, dtype=torch.int32)}, r"features is torch.int32"),
        (dict.fromkeys(("incoming", "style_matrix", "content_target")), r"no term is given"),
        ({"style_factor": None}, r"style_matrix is given and style_factor is not"),
        ({"style_matrix": None}, r"style_factor is given and style_matrix is not"),
        ({"content_factor": None}, r"content_target is given and content_factor is not"),
        ({"content_target": None}, r"content_factor is given and content_target is not"),
        ({"incoming": torch.zeros(2, 3, 5, 4)}, r"incoming has shape \(2, 3, 5, 4\), expected \(2, 3, 4, 5\)"),
        ({"incoming": torch.zeros(2, 3, 4, 5).half()}, r"incoming is torch.float16, expected torch.float32"),
        ({"incoming": torch.zeros(2, 3, 4, 5, device="meta")}, r"incoming is on meta, features on cpu"),
        (
            {"style_matrix": StyleMatrix(torch.zeros(3, 3), torch.ones(2))},
            r"style_matrix.values has shape \(3, 3\), expected \(2, 3, 3\)",
        ),
        (
            {"style_matrix": StyleMatrix(torch.zeros(2, 3, 3).bfloat16(), torch.ones(2))},
            r"style_matrix.values is torch.bfloat16, expected torch.float32",
        ),
        (
            {"style_matrix": StyleMatrix(torch.zeros(2, 3, 3), torch.ones(1))},
            r"style_matrix.scale has shape \(1,\), expected \(2,\)",
        ),
        ({"style_factor": torch.ones(())}, r"style_factor has shape \(\), expected \(2,\)"),
        ({"style_factor": torch.ones(2).double()}, r"style_factor is torch.float64, expected torch.float32"),
        ({"style_factor": torch.ones(2, device="meta")}, r"style_factor is on meta, features on cpu"),
        ({"content_target": torch.zeros(1, 3, 4, 5)}, r"content_target has shape \(1, 3, 4, 5\), expected"),
        ({"content_target": torch.zeros(2, 3, 4, 5).double()}, r"content_target is torch.float64, expected"),
        ({"content_factor": torch.ones(3)}, r"content_factor has shape \(3,\), expected \(2,\)"),
    ],
)
def test_loss_relu_backward_refuses_bad_input(change, message):
    check_bad_input(loss_relu_backward, GOOD | change, message)
