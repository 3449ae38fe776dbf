"""Norms that are recomputed for the backward: the same numbers as saved ones, and less memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastnst_kernels import batch_norm, instance_norm
from fastnst_kernels.conv.convolution import convolution
from fastnst_kernels.norm.recompute import recomputed_batch_norm, recomputed_instance_norm, recomputed_output
from fastnst_kernels.norm.upsample_pad import UpsamplePad
from helpers.kernels.kernel_cases import DTYPES, LAYOUTS, check_op, parameters, randn, same_bits
from helpers.op_counter import OpCounter
from helpers.tolerances import assert_as_exact_as_torch

# With `residual`, its margin.
EPILOGUES: list[dict[str, Any]] = [
    {},
    {"relu": True, "padding": (1, 2, 0, 1), "padding_mode": "zeros"},
    {"relu": True, "upsample": 2, "padding": 1},
    {"residual": 1, "padding": 1},
    {"residual": 0, "relu": True, "padding": 1, "padding_mode": "symmetric"},
]


def norm_of(kind: str, x, weight, bias, *, recomputed: bool, **options):
    if kind == "instance":
        return (recomputed_instance_norm if recomputed else instance_norm)(x, weight, bias, **options)
    running = [torch.zeros(x.shape[1], dtype=weight.dtype, device=x.device) for _ in range(2)]
    if recomputed:
        return recomputed_batch_norm(x, weight, bias, *running, **options)
    return batch_norm(x, weight, bias, *running, training=True, **options)


def inputs_of(options: dict[str, Any], dtype: torch.dtype, device: torch.device | str = "cpu"):
    """x, a residual or None, a convolution's filters, and the norm's options."""
    options = dict(options)
    border = options.pop("residual", None)
    x = LAYOUTS["channels_last"](randn((2, 5, 4, 5), dtype, device))
    residual = None if border is None else randn((2, 5, 4 + 2 * border, 5 + 2 * border), dtype, device, seed=4)
    return x, residual, randn((3, 5, 3, 3), dtype, device, seed=5), options


def outcomes(kind: str, x, residual, filters, *, recomputed: bool, transposed: bool = False, **options):
    """The result of norm and convolution, and every gradient."""
    leaves = [t for t in (x, *parameters(x.shape[1], x.device), filters, residual) if t is not None]
    leaves = [t.detach().requires_grad_() for t in leaves]
    x, weight, bias, filters, *rest = leaves
    y = norm_of(kind, x, weight, bias, residual=rest[0] if rest else None, recomputed=recomputed, **options)
    z = convolution(y, filters.to(y.dtype), stride=2, transposed=transposed)
    return [z, *torch.autograd.grad(z, leaves, randn(z.shape, z.dtype, z.device, seed=9))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", EPILOGUES, ids=str)
@pytest.mark.parametrize("kind", ["instance", "batch"])
def test_recomputed_norm_gives_the_bits_of_a_saved_one(kind, options, dtype):
    x, residual, filters, options = inputs_of(options, dtype)
    saved, recomputed = (outcomes(kind, x, residual, filters, recomputed=way, **options) for way in (False, True))
    assert same_bits(recomputed, saved)


@pytest.mark.parametrize("kind", ["instance", "batch"])
def test_recomputed_norm_of_constant_channels_gives_the_same_bits(tier, kind):
    """They are exactly the bias; what is recomputed has only mean and 1/√(σ² + ε)."""
    x = LAYOUTS["channels_last"](randn((2, 5, 6, 7), torch.float32, tier.device))
    x[:, 1], x[0, 3] = 12345.678, 0.1
    y = norm_of(kind, x.requires_grad_(), *parameters(5, tier.device), recomputed=True, relu=True)
    assert torch.equal(recomputed_output(y.grad_fn), y)


@pytest.mark.parametrize("kind", ["instance", "batch"])
def test_recomputed_norm_in_every_tier(tier, kind):
    """On a GPU one pass may round otherwise than two do."""
    x, residual, filters, options = inputs_of(EPILOGUES[-1], torch.bfloat16, tier.device)
    saved, recomputed = (outcomes(kind, x, residual, filters, recomputed=way, **options) for way in (False, True))
    wide = [t.cpu().double() for t in (x, residual, filters)]
    for a, b, truth in zip(recomputed, saved, outcomes(kind, *wide, recomputed=False, **options), strict=True):
        assert_as_exact_as_torch(a, b, truth, dtype=x.dtype, conditioning=x.numel() ** 0.5)
        assert tier.name == "gpu" or torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_recomputed_norm_with_any_layout_and_both_convolutions(layout, transposed):
    x = LAYOUTS[layout](randn((2, 5, 6, 7)))
    filters = randn((5, 3, 3, 3) if transposed else (3, 5, 3, 3), seed=5)
    options = {"transposed": transposed, "relu": True, "padding": 1}
    saved, recomputed = (outcomes("instance", x, None, filters, recomputed=way, **options) for way in (False, True))
    assert same_bits(recomputed, saved)


def chain(x: torch.Tensor, leaves: list[torch.Tensor], recomputed: bool, blocks: int = 3) -> torch.Tensor:
    """A norm, residual blocks of one convolution, and a last convolution."""
    weight, bias, filters = leaves

    def norm(x: torch.Tensor, **options: Any) -> torch.Tensor:
        return norm_of("instance", x, weight, bias, recomputed=recomputed, padding=1, **options)

    y = norm(x, relu=True)
    for _ in range(blocks):
        y = norm(convolution(y, filters), residual=y)
    return convolution(y, filters)


def chain_leaves(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    leaves = [*parameters(4, device), randn((4, 4, 3, 3), torch.float32, device, seed=5)]
    return [leaf.to(dtype).requires_grad_() for leaf in leaves]


def saved_bytes(run: Callable[[], torch.Tensor], without: list[torch.Tensor]) -> int:
    """Bytes of the storages that autograd saves, `without` those."""
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        z = run()
    known = {tensor.untyped_storage()._cdata for tensor in without}
    count = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in known)
    del z
    return count


def test_recomputed_chain_runs_once_and_saves_no_result(tier):
    blocks = 1 if tier.name == "interpreter" else 3
    x = LAYOUTS["channels_last"](randn((2, 4, 3, 4), torch.float32, tier.device)).requires_grad_()
    leaves = chain_leaves(tier.device)
    dz = randn(x.shape, torch.float32, tier.device, seed=6)
    gradients = []
    for recomputed in (False, True):
        z = chain(x, leaves, recomputed, blocks)
        with OpCounter() as ops:
            gradients.append(torch.autograd.grad(z, [x, *leaves], dz))
        # Once for each result, although each block's is computed from the one before.
        assert ops.counts["norm"] == (blocks + 1 if recomputed else 0)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    # Beside x itself the other norms' inputs, and mean and 1/deviation `[2, 4]` of each.
    inputs, statistics = blocks * x.nbytes, (blocks + 1) * 2 * 2 * 4 * 4
    assert saved_bytes(lambda: chain(x, leaves, True, blocks), [x, *leaves]) == inputs + statistics
    padded = (blocks + 1) * 2 * 4 * 5 * 6 * 4
    assert saved_bytes(lambda: chain(x, leaves, False, blocks), [x, *leaves]) == inputs + statistics + padded


def test_recomputed_values_are_freed():
    """After the forward and after the backward, while the graph is still there."""
    x, leaves = randn((1, 4, 5, 5)).requires_grad_(), chain_leaves()
    z = chain(x, leaves, True)
    nodes, waiting = [], [z.grad_fn]
    while waiting:
        node = waiting.pop()
        nodes.append(node)
        waiting += [following for following, _ in node.next_functions if following is not None]
    norms = {id(node): node for node in nodes if hasattr(node, "residual_node")}
    assert len(norms) == 4
    assert all(node.value is None for node in norms.values())
    z.sum().backward(retain_graph=True)
    assert all(node.value is None for node in norms.values())


def test_recomputed_backward_twice_and_for_some_weights_only():
    x, leaves = randn((2, 4, 6, 7)).requires_grad_(), chain_leaves()
    z = chain(x, leaves, True)
    dz = randn(z.shape, seed=6)
    first = torch.autograd.grad(z, [x, *leaves], dz, retain_graph=True)
    (filters,) = torch.autograd.grad(z, leaves[2:], dz, retain_graph=True)
    assert torch.equal(filters, first[3])
    assert same_bits(first, torch.autograd.grad(z, [x, *leaves], dz))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(z, [x, *leaves], dz)


def test_recomputed_norm_with_frozen_parts():
    """If the norm before is no part of the graph, its result is an ordinary tensor."""
    x, (weight, bias, filters) = randn((2, 4, 6, 7)), chain_leaves()
    dz = randn((2, 4, 6, 7), seed=6)
    frozen_norm, frozen_filters = [weight.detach(), bias.detach(), filters], [weight, bias, filters.detach()]
    for leaves, wanted in ((frozen_norm, [filters]), (frozen_filters, [weight, bias])):
        assert same_bits(*(torch.autograd.grad(chain(x, leaves, way), wanted, dz) for way in (False, True)))


def test_recomputed_result_that_was_modified_is_saved_as_it_is():
    (weight, bias, filters), x = chain_leaves(), randn((2, 4, 6, 7))
    gradients = []
    for recomputed in (False, True):
        y = norm_of("instance", x, weight, bias, recomputed=recomputed)
        with torch.no_grad():
            y.mul_(3)
        z = convolution(y, filters)
        gradients.append(torch.autograd.grad(z, filters, randn(z.shape, seed=6))[0])
    assert torch.equal(*gradients)


def test_recomputed_result_is_an_ordinary_tensor_for_other_ops():
    x, (weight, bias, filters) = randn((2, 4, 6, 7)), chain_leaves()
    results = (norm_of("instance", x, weight, bias, relu=True, recomputed=way) for way in (True, False))
    actual, expected = (
        torch.autograd.grad((y * y).sum() + F.conv2d(y, filters).square().sum(), [weight, bias, filters])
        for y in results
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["instance", "batch"])
def test_recomputed_norm_gradcheck(kind):
    x = randn((2, 4, 4, 3), torch.float64, seed=1).requires_grad_()
    weight, bias, filters = chain_leaves(dtype=torch.float64)

    def run(x, weight, bias, filters):
        y = norm_of(kind, x, weight, bias, relu=True, padding=1, recomputed=True)
        z = norm_of(kind, convolution(y, filters), weight, bias, residual=y, padding=1, recomputed=True)
        return convolution(z, filters, stride=2)

    assert torch.autograd.gradcheck(run, (x, weight, bias, filters))


def test_recomputed_batch_norm_updates_running_statistics_once():
    x, (weight, bias, filters) = randn((2, 4, 6, 7)), chain_leaves()
    ours, theirs = ([torch.zeros(4), torch.ones(4)] for _ in range(2))
    y = recomputed_batch_norm(x, weight, bias, *ours, momentum=0.3)
    convolution(y, filters).sum().backward()
    batch_norm(x, weight, bias, *theirs, training=True, momentum=0.3)
    assert same_bits(ours, theirs)


def test_recomputed_norm_under_autocast():
    """The convolution runs and saves its weights in bfloat16, as PyTorch's own; gradients are fp32."""
    x, leaves, first = randn((2, 4, 9, 8)), chain_leaves(), randn((4, 4, 3, 3), seed=7)
    gradients = []
    for recomputed in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            z = chain(F.conv2d(x, first, padding=1), leaves, recomputed, blocks=0)
        assert z.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(z, leaves, randn(z.shape, z.dtype, seed=6)))
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1])
    assert same_bits(*gradients)


def test_recomputed_norm_without_gradients_is_the_plain_one():
    x, leaves = randn((2, 4, 6, 7)), chain_leaves()
    with torch.no_grad():
        saved, recomputed = (chain(x, leaves, way) for way in (False, True))
    assert torch.equal(saved, recomputed)
    assert recomputed.grad_fn is None


def test_recomputed_chain_compiles_to_one_graph():
    x, leaves = randn((2, 4, 6, 7)).requires_grad_(), chain_leaves()
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    dz = randn(x.shape, seed=6)
    expected, actual = (torch.autograd.grad(fn(x, leaves, True), [x, *leaves], dz) for fn in (chain, compiled))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_norm_with_given_statistics_passes_opcheck(tier):
    """Per sample and, which the kernels read in the same way, per channel; no gradient."""
    x = LAYOUTS["channels_last"](randn((2, 4, 3, 5), torch.float32, tier.device))
    residual = randn((2, 4, 5, 7), torch.float32, tier.device, seed=3)
    pad = UpsamplePad(2, (1, 0, 2, 1), "reflect").as_ints()
    for shape in [(2, 4), (4,)] if tier.name == "reference" else [(2, 4)]:
        statistics = [randn(shape, device=tier.device, seed=1), randn(shape, device=tier.device, seed=2).abs()]
        arguments = (x, *parameters(4, tier.device), statistics, residual, len(shape) == 2, 0.0, True, pad)
        check_op(torch.ops.fastnst.norm, arguments, tier)


def test_recomputed_norms_refuse_bad_input():
    x, one = torch.zeros(2, 4, 6, 7), torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), expected \(4,\)"):
        recomputed_instance_norm(x, torch.ones(3), one)
    with pytest.raises(ValueError, match="training needs more than one value per channel"):
        recomputed_batch_norm(x[:1, :, :1, :1], one, one, torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match=r"running_var has shape \(5,\)"):
        recomputed_batch_norm(x, one, one, torch.zeros(4), torch.ones(5))
