"""Properties of Gram matrices, the style loss and its gradients for any shape, dtype and format."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastnst_kernels import (
    gram_matrix,
    gram_matrix_reference,
    loss_relu_backward,
    loss_relu_backward_reference,
    style_loss,
    style_loss_reference,
)
from fastnst_kernels.gram.style_loss import style_matrix_reference
from helpers.kernel_cases import DTYPES, LAYOUTS, examples, gradients, randn, same_format, whole_numbers

channels = st.sampled_from([1, 2, 3, 7, 8, 16, 17, 24, 32, 33, 64, 65, 72, 100])
shapes = st.tuples(st.integers(1, 3), channels, st.integers(1, 9), st.sampled_from([1, 2, 3, 5, 8, 13, 31]))
seeds = st.integers(0, 2**16)
dtypes, layouts = st.sampled_from(DTYPES), st.sampled_from(sorted(LAYOUTS))


@examples(16, interpreted=6)
@given(shape=shapes, dtype=dtypes, layout=layouts, seed=seeds)
def test_gram_matrix_of_whole_numbers_is_exact(tier, shape, dtype, layout, seed):
    """FᵀF is a whole number in fp32, so nothing but the division by C·K rounds, and G is symmetric."""
    features = LAYOUTS[layout](whole_numbers(shape, dtype, tier.device, seed))
    gram = gram_matrix(features)
    exact = gram_matrix_reference(features.double())
    torch.testing.assert_close(gram.double(), exact, rtol=2**-22, atol=0)
    assert torch.equal(gram, gram.mT)


@examples(16, interpreted=6)
@given(shape=shapes, dtype=dtypes, layout=layouts, seed=seeds, shared=st.booleans())
def test_style_loss_of_whole_numbers(tier, shape, dtype, layout, seed, shared):
    n, c = shape[:2]
    features = LAYOUTS[layout](whole_numbers(shape, dtype, tier.device, seed))
    target = whole_numbers((c, c) if shared else (n, c, c), torch.float32, tier.device, seed + 1)
    dy = whole_numbers((n,), torch.float32, tier.device, seed + 2)
    loss, grads = gradients(style_loss, [features, target], dy)
    exact_loss, exact_grads = gradients(style_loss_reference, [features, target], dy, torch.float64)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2**-18, atol=2**-18)
    assert same_format(grads[0], features)
    for grad, exact in zip(grads, exact_grads, strict=True):
        # What cancels in D = G − T, numbers below 10, keeps their rounding; the factor is at most 6, the sum 9·C.
        bound = 4 * torch.finfo(grad.dtype).eps * exact.abs().max().item() + 2.0**-17
        assert (grad.double() - exact).abs().max().item() <= bound


@examples(16, interpreted=6)
@given(
    shape=shapes,
    dtype=dtypes,
    layout=layouts,
    seed=seeds,
    terms=st.sets(st.sampled_from(["incoming", "style", "content"]), min_size=1),
)
def test_loss_relu_backward_of_any_terms(tier, shape, dtype, layout, seed, terms):
    n, c = shape[:2]
    features = LAYOUTS[layout](whole_numbers(shape, dtype, tier.device, seed).relu())
    arguments = {}
    if "incoming" in terms:
        arguments["incoming"] = LAYOUTS[layout](whole_numbers(shape, dtype, tier.device, seed + 1))
    if "style" in terms:
        difference = whole_numbers((n, c, c), torch.float32, tier.device, seed + 2)
        arguments["style_matrix"] = style_matrix_reference(difference, dtype)
        arguments["style_factor"] = whole_numbers((n,), torch.float32, tier.device, seed + 3)
    if "content" in terms:
        arguments["content_target"] = LAYOUTS[layout](randn(shape, dtype, tier.device, seed=seed + 4))
        arguments["content_factor"] = whole_numbers((n,), torch.float32, tier.device, seed + 5)
    result = loss_relu_backward(features, **arguments)
    wide = {
        name: type(value)(*(part.double() for part in value)) if isinstance(value, tuple) else value.double()
        for name, value in arguments.items()
    }
    exact = loss_relu_backward_reference(features.double(), **wide)
    bound = 2 * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
    assert (result.double() - exact).abs().max().item() <= bound
    assert same_format(result, features)
    assert not result[features <= 0].any()
