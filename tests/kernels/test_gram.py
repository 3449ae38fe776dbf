"""Gram matrices and the style loss in every tier: against PyTorch and fp64."""

import pytest
import torch

from fastnst_kernels import (
    gram_matrix,
    gram_matrix_reference,
    runtime,
    style_loss,
    style_loss_and_matrix,
    style_loss_reference,
)
from fastnst_kernels.gram import kernels as gram_kernels
from fastnst_kernels.gram import product
from fastnst_kernels.gram.style_loss import style_matrix_reference
from helpers.kernels.kernel_cases import (
    DTYPES,
    LAYOUTS,
    check_bad_input,
    check_op,
    gradients,
    randn,
    same_bits,
    same_format,
    spread_like,
    with_dtypes,
)
from helpers.tolerances import assert_as_exact_as_torch

# One position; C = 3, 17 and 32; several tiles of 64, with a remainder, in aligned and in odd rows; primes; more
# positions than a chunk. Tiles of 128 have tests of their own: `…_with_every_tile`.
SHAPES = [(2, 3, 7, 11), (1, 17, 5, 13), (2, 32, 13, 19), (3, 5, 1, 1), (1, 67, 3, 5), (1, 72, 4, 6)]
CASES = [("channels_last", shape) for shape in SHAPES] + [("contiguous", SHAPES[5])]
CASES += [(layout, SHAPES[0]) for layout in LAYOUTS if layout != "channels_last"]


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


@pytest.mark.parametrize(("layout", "shape", "dtype"), with_dtypes(CASES), ids=str)
def test_gram_matrix_agrees_with_torch(tier, layout, shape, dtype):
    features = LAYOUTS[layout](randn(shape, dtype, tier.device))
    # An asymmetric gradient, exact in every dtype: both factors of FᵀF must get their share.
    dy = randn((shape[0], shape[1], shape[1]), torch.bfloat16, tier.device, seed=9).float()
    (d_features,) = check(gram_matrix, torch_gram, gram_matrix_reference, [features], dy, dtype)
    assert d_features.dtype == dtype
    assert same_format(d_features, features)


@pytest.mark.parametrize(("layout", "shape", "dtype"), with_dtypes(CASES), ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["one_target", "target_per_sample"])
def test_style_loss_agrees_with_torch(tier, layout, shape, dtype, shared):
    n, c = shape[:2]
    features = LAYOUTS[layout](randn(shape, dtype, tier.device))
    # Not symmetric either, though a Gram matrix would be.
    target = randn((c, c) if shared else (n, c, c), torch.bfloat16, tier.device, seed=4).float() / 16
    dy = randn((n,), torch.bfloat16, tier.device, seed=9).float()
    grads = check(style_loss, torch_style_loss, style_loss_reference, [features, target], dy, dtype)
    assert grads[0].dtype == dtype


@pytest.mark.parametrize("chunk", [128, 384, 2048])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_style_loss_with_any_split_of_the_positions(tier, chunk, dtype, monkeypatch):
    """One, several and more than eight partial sums (merged eight at a time), the last one shorter."""
    monkeypatch.setattr(gram_kernels, "positions_per_split", lambda *_: chunk)
    features = LAYOUTS["channels_last"](randn((1, 5, 37, 41), dtype, tier.device))
    target = torch.eye(5, device=tier.device)
    dy = randn((1,), torch.bfloat16, tier.device, seed=2).float()
    check(style_loss, torch_style_loss, style_loss_reference, [features, target], dy, dtype)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("name", gram_kernels.GRAM_TILES)
def test_style_loss_with_every_tile(tier, name, layout, monkeypatch):
    """Each configuration with two tiles of channels and several of positions, with remainders."""
    tile = gram_kernels.GRAM_TILES[name]
    monkeypatch.setattr(gram_kernels, "gram_tile", lambda _: tile)
    channels = tile.rows + 8
    features = LAYOUTS[layout](randn((1, channels, 3, 46), torch.bfloat16, tier.device))
    target = randn((channels, channels), torch.bfloat16, tier.device, seed=4).float() / 16
    check(style_loss, torch_style_loss, style_loss_reference, [features, target], torch.ones(1), torch.bfloat16)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("name", product.PRODUCT_TILES)
def test_gram_matrix_backward_with_every_tile(tier, name, layout, monkeypatch):
    tile = product.PRODUCT_TILES[name]
    monkeypatch.setattr(product, "product_tile", lambda _: tile)
    channels = tile.columns + 8
    features = LAYOUTS[layout](randn((1, channels, 3, 46), torch.bfloat16, tier.device))
    dy = randn((1, channels, channels), torch.bfloat16, tier.device, seed=9).float()
    check(gram_matrix, torch_gram, gram_matrix_reference, [features], dy, torch.bfloat16)


def test_gram_tile_and_product_tile_by_shape(monkeypatch):
    """Some shape, type and format leads to every entry of both tables; before Hopper no tile is shared."""

    def empty(shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)

    shapes = [(16, 64, 256, 256), (16, 128, 128, 128), (16, 256, 64, 64), (16, 512, 32, 32), (4, 512, 16, 16)]
    features = [empty(shape) for shape in shapes] + [empty((1, 17, 9, 9)), empty((1, 8, 9, 9), torch.float32)]
    chosen = {}
    for capability in ((8, 0), (9, 0), (10, 0)):
        monkeypatch.setattr(runtime, "chip", lambda _, capability=capability: runtime.Chip(108, capability))
        chosen[capability] = [gram_kernels.gram_tile(f) for f in features]
    tiles = gram_kernels.GRAM_TILES
    names = ["64 shared", "128 shared", "128", "128", "64 small", "narrow", "ieee"]
    assert chosen[9, 0] == chosen[10, 0] == [tiles[name] for name in names]
    assert chosen[8, 0] == [tiles[name] for name in ["64 small", "128", *names[2:]]]
    names = ["C ≤ 64", "C ≤ 128", "C > 128", "C > 128", "small", "narrow", "ieee"]
    assert [product.product_tile(f) for f in features] == [product.PRODUCT_TILES[n] for n in names]


def test_positions_per_split_depends_on_the_work_alone():
    """Chunks of 128 positions that cover all; one for many programs, else about 128 programs."""
    for programs, positions in ((1, 1), (1, 127), (16, 65536), (4, 65536), (48, 4096), (160, 1024), (576, 256)):
        chunk = gram_kernels.positions_per_split(programs, positions, 64)
        splits = -(-positions // chunk)
        assert chunk % 128 == 0
        assert splits * chunk >= positions > (splits - 1) * chunk
        assert programs * splits <= max(programs, 256)
    assert gram_kernels.positions_per_split(16, 65536, 64) == 65536 // 8
    assert gram_kernels.positions_per_split(160, 1024, 128) == 1024


def test_precision_of_is_tf32_where_pytorchs_is():
    wide, narrow = randn((1, 3, 2, 2)), randn((1, 3, 2, 2), torch.bfloat16)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert gram_kernels.precision_of(wide) == "tf32"
        assert gram_kernels.precision_of(narrow) == "ieee"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert gram_kernels.precision_of(wide) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_gram_matrix_by_hand(tier):
    """F = [[1, 2], [3, 4]] (channel × position), C·K = 4: G = [[5, 11], [11, 25]] / 4."""
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=tier.device).view(1, 2, 1, 2)
    assert gram_matrix(features).tolist() == [[[1.25, 2.75], [2.75, 6.25]]]
    target = torch.tensor([[1.25, 0.75], [2.75, 5.25]], device=tier.device)
    assert style_loss(features, target).tolist() == [2.0**2 + 1.0]


def test_style_loss_of_large_fp16_features_does_not_overflow(tier):
    """Features of thousands (0–255 scale): squares beyond fp16's 65504, gradients within it."""
    features = randn((1, 4, 16, 16), torch.float16, tier.device) * 8000
    leaf = features.requires_grad_()
    loss = style_loss(leaf, torch.zeros(4, 4, device=tier.device))
    (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 1e-8))
    assert loss.item() > 1e13
    zeros, dy = torch.zeros(4, 4, device=tier.device), torch.full((1,), 1e-8, device=tier.device)
    true_loss, (true_grad, _) = gradients(style_loss_reference, [features, zeros], dy, torch.float64)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=2e-3, atol=2e-3 * true_grad.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("target", [0.0, 1e-12, 1.0, 1e12])
def test_style_loss_of_any_magnitude(tier, dtype, scale, target):
    """From a black image to features of thousands, with targets far below and far above their Gram matrix.

    The gradient's factor keeps the result's largest element near 1, whatever D is: only D's own range is at stake.
    """
    features = LAYOUTS["channels_last"](randn((2, 5, 6, 7), torch.float32, tier.device) * scale).to(dtype)
    # One sample's features dwarf the other's, which must not lose its digits to a common scale.
    features[1] *= 1e-2
    target_gram = randn((5, 5), torch.float32, tier.device, seed=4).abs() * target
    f = features.double().flatten(2).mT
    difference = gram_matrix_reference(features.double()) - target_gram
    matrix = difference + difference.mT
    terms = torch.bmm(f.abs(), matrix.abs()).amax((1, 2)) / 210
    dy = (1 / terms.clamp(min=1e-15)).float() / 2
    loss, (grad,) = gradients(lambda f: style_loss(f, target_gram), [features], dy)
    expected = torch.bmm(f, matrix) * (dy.double() / 105).view(-1, 1, 1)
    torch.testing.assert_close(loss.double(), difference.square().sum((1, 2)), rtol=1e-5, atol=1e-30)
    # The operand is rounded once and the result once (by the interpreter towards zero, which errs twice as much); each
    # sum's terms add up to 1 at most, and their sum's rounding is fp32's.
    error = (grad.double().flatten(2).mT - expected).abs().amax().item()
    assert error <= 2 * torch.finfo(dtype).eps + 32 * torch.finfo(torch.float32).eps


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, which the interpreter multiplies with
def test_style_loss_keeps_nan_and_inf(tier):
    for dtype in DTYPES:
        features = torch.ones((3, 4, 3, 5), dtype=dtype, device=tier.device)
        features[0, 1, 2, 3] = float("nan")
        features[1, 1, 2, 3] = float("inf")
        target, dy = torch.eye(4, device=tier.device), torch.ones(3, device=tier.device)
        loss, (grad, _) = gradients(style_loss, [features, target], dy)
        assert loss[0].isnan()
        assert not loss[1].isfinite()
        assert loss[2].isfinite()
        assert grad[0].isnan().any()
        assert not grad[1].isfinite().all()
        assert grad[2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 9, 5), (1, 72, 4, 6)], ids=str)
def test_gram_matrix_is_exactly_symmetric(tier, dtype, shape):
    gram = gram_matrix(LAYOUTS["channels_last"](randn(shape, dtype, tier.device)))
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_matrix_of_large_means_and_constants(tier, dtype):
    """Means of 10⁴ with unit variance, and a constant image."""
    for features in (randn((2, 17, 9, 13), torch.float32, tier.device) + 1e4, torch.full((1, 3, 8, 8), 7.0)):
        features = LAYOUTS["channels_last"](features.to(tier.device, dtype))
        gram = gram_matrix(features)
        torch.testing.assert_close(gram.double(), gram_matrix_reference(features.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_style_loss_and_matrix(tier, dtype):
    """scale·values is D + Dᵀ to the operand's precision; the scale is a power of two, 1 except for fp16."""
    features = randn((2, 7, 5, 6), dtype, tier.device)
    target = randn((7, 7), torch.float32, tier.device, seed=3)
    loss, matrix = style_loss_and_matrix(features.requires_grad_(), target)
    assert torch.equal(loss, style_loss(features, target))
    assert not loss.requires_grad
    assert not matrix.values.requires_grad
    assert matrix.values.dtype == dtype
    difference = gram_matrix(features.detach()) - target
    expected = style_matrix_reference(difference, torch.float32).values
    close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(matrix.values.float() * matrix.scale.view(-1, 1, 1), expected, **close)
    assert torch.equal(torch.frexp(matrix.scale)[0], torch.full_like(matrix.scale, 0.5))
    if dtype != torch.float16:
        assert torch.equal(matrix.scale, torch.ones_like(matrix.scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_style_loss_gives_the_same_bits_twice(tier, dtype):
    shape = (2, 17, 23, 29) if tier.name == "gpu" else (2, 17, 7, 9)
    features = LAYOUTS["channels_last"](randn(shape, dtype, tier.device))
    target, dy = torch.zeros(17, 17, device=tier.device), torch.ones(2, device=tier.device)
    first, second = (gradients(style_loss, [features, target], dy) for _ in range(2))
    assert same_bits([first[0], *first[1]], [second[0], *second[1]])


def test_gram_backward_takes_a_gradient_of_any_layout(tier):
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


def test_style_loss_gives_a_constant_target_no_gradient(tier):
    features = randn((1, 3, 4, 4), torch.float32, tier.device).requires_grad_()
    target = torch.eye(3, device=tier.device)
    style_loss(features, target).sum().backward()
    assert features.grad is not None
    assert target.grad is None


def test_gram_ops_pass_opcheck(tier):
    features = LAYOUTS["channels_last"](randn((2, 3, 4, 5), torch.float32, tier.device)).requires_grad_()
    target = randn((3, 3), torch.float32, tier.device, seed=1).requires_grad_()
    check_op(torch.ops.fastnst.gram_matrix, (features,), tier)
    check_op(torch.ops.fastnst.style_loss, (features, target), tier)
    matrix, factor = (randn(s, torch.float32, tier.device, seed=2) for s in ((2, 3, 3), (2,)))
    for dtype in DTYPES[:2]:
        plain = features.detach().to(dtype)
        check_op(torch.ops.fastnst.gram_backward, (plain, matrix), tier)
        check_op(torch.ops.fastnst.style_backward, (plain, matrix.to(dtype), factor, factor), tier)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by PyTorch's own forward mode
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram_gradcheck(layout):
    features = LAYOUTS[layout](randn((2, 3, 2, 4), torch.float64)).requires_grad_()
    target = randn((3, 3), torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(gram_matrix, [features], check_forward_ad=True)
    assert torch.autograd.gradcheck(gram_matrix_reference, [features])
    assert torch.autograd.gradcheck(style_loss, [features, target], check_forward_ad=True)
    assert torch.autograd.gradcheck(style_loss_reference, [features, target])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by PyTorch's own forward mode
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram_second_and_third_derivatives_gradcheck(layout):
    features = LAYOUTS[layout](randn((2, 3, 2, 3), torch.float64)).requires_grad_()
    targets = [randn(shape, torch.float64, seed=1).requires_grad_() for shape in ((3, 3), (2, 3, 3))]
    for fn, inputs in ((gram_matrix, [features]), *((style_loss, [features, target]) for target in targets)):
        assert torch.autograd.gradgradcheck(fn, inputs, check_fwd_over_rev=True)

        def gradient(*inputs, fn=fn):
            return torch.autograd.grad(fn(*inputs).sin().sum(), inputs[0], create_graph=True)[0]

        assert torch.autograd.gradgradcheck(gradient, inputs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by PyTorch's own forward mode
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_second_derivative_in_every_tier(tier, dtype):
    """A product of Hessian and vector, of both functions, as that of the formula in fp64; and forward mode."""
    features = LAYOUTS["channels_last"](randn((2, 5, 4, 6), dtype, tier.device))
    target, v = randn((5, 5), torch.float32, tier.device, seed=1), randn(features.shape, dtype, tier.device, seed=2)
    for fn, formula in (
        (lambda x: gram_matrix(x).square().sum(), lambda x: gram_matrix_reference(x).square().sum()),
        (lambda x: style_loss(x, target.to(runtime.statistics_dtype(x))).sum(),
         lambda x: style_loss_reference(x, target).sum()),
    ):  # fmt: skip
        products = []
        for function, x, direction in ((fn, features, v), (formula, features.double(), v.double())):
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
            (product,) = torch.autograd.grad(gradient, leaf, direction)
            assert product.dtype == x.dtype
            products.append((product.double(), torch.func.jvp(function, (x,), (direction,))[1].double()))
        for actual, truth in zip(*products, strict=True):
            bound = 4 * torch.finfo(dtype).eps * truth.abs().max().item()
            torch.testing.assert_close(actual, truth, rtol=0, atol=bound)


def test_style_loss_compiles_to_one_graph():
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
def test_style_loss_refuses_bad_input(change, message):
    check_bad_input(style_loss, {"features": torch.zeros(2, 3, 4, 5), "target_gram": torch.eye(3)} | change, message)


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
def test_style_loss_ignores_autocast(tier, autocast):
    features = randn((2, 5, 7, 9), torch.float32, tier.device) * 3000
    target, dy = torch.zeros(5, 5, device=tier.device), torch.ones(2, device=tier.device)
    plain = gradients(lambda f: style_loss(f, target), [features], dy)
    with torch.autocast(tier.device.type, dtype=autocast):
        under = gradients(lambda f: style_loss(f, target), [features], dy)
    assert torch.equal(under[0], plain[0])
    assert torch.equal(under[1][0], plain[1][0])
