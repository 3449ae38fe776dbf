"""Norms that are made again for the backward: the same numbers as kept ones, and less that is kept."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastnst_kernels import batch_norm, instance_norm
from fastnst_kernels.norm.recompute import _planes, convolution, recomputed_batch_norm, recomputed_instance_norm
from helpers.kernel_cases import DTYPES, LAYOUTS, parameters, randn
from helpers.tolerances import assert_as_exact_as_torch

EPILOGUES: list[dict[str, Any]] = [
    {},
    {"relu": True, "padding": (1, 2, 0, 1), "padding_mode": "zeros"},
    {"relu": True, "upsample": 2, "padding": 1},
    {"residual": 1, "padding": 1},
    {"residual": 0, "relu": True, "padding": 1, "padding_mode": "symmetric"},
]


class Ops(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def normalise(norm: str, x, weight, bias, *, again: bool, **options):
    if norm == "instance":
        return (recomputed_instance_norm if again else instance_norm)(x, weight, bias, **options)
    running = [torch.zeros(x.shape[1], dtype=weight.dtype, device=x.device) for _ in range(2)]
    if again:
        return recomputed_batch_norm(x, weight, bias, *running, **options)
    return batch_norm(x, weight, bias, *running, training=True, **options)


def case_of(options: dict[str, Any], dtype: torch.dtype, device: torch.device | str = "cpu"):
    """x, a residual or None, a convolution's filters, and the norm's options."""
    options = dict(options)
    border = options.pop("residual", None)
    x = LAYOUTS["channels_last"](randn((2, 5, 4, 5), dtype, device))
    residual = None if border is None else randn((2, 5, 4 + 2 * border, 5 + 2 * border), dtype, device, seed=4)
    return x, residual, randn((3, 5, 3, 3), dtype, device, seed=5), options


def outcomes(norm: str, x, residual, filters, dz_seed: int = 9, *, again: bool, transposed: bool = False, **options):
    """What norm and convolution give, and every gradient."""
    weight, bias = parameters(x.shape[1], x.device)
    leaves = [t for t in (x, weight, bias, filters, residual) if t is not None]
    leaves = [t.detach().requires_grad_() for t in leaves]
    x, weight, bias, filters, *rest = leaves
    y = normalise(norm, x, weight, bias, residual=rest[0] if rest else None, again=again, **options)
    z = convolution(y, filters.to(y.dtype), stride=2, transposed=transposed)
    dz = randn(z.shape, z.dtype, z.device, seed=dz_seed)
    return [z, *torch.autograd.grad(z, leaves, dz)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", EPILOGUES, ids=str)
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_same_bits_as_what_is_kept(norm, options, dtype):
    x, residual, filters, options = case_of(options, dtype)
    kept, again = (outcomes(norm, x, residual, filters, again=again, **options) for again in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_in_every_tier(tier, norm):
    """On a GPU one pass may round otherwise than two do."""
    x, residual, filters, options = case_of(EPILOGUES[-1], torch.bfloat16, tier.device)
    kept, again = (outcomes(norm, x, residual, filters, again=again, **options) for again in (False, True))
    wide = [t.cpu().double() for t in (x, residual, filters)]
    exact = outcomes(norm, *wide, again=False, **options)
    for a, b, truth in zip(again, kept, exact, strict=True):
        assert_as_exact_as_torch(a, b, truth, dtype=x.dtype, conditioning=x.numel() ** 0.5)
        assert tier.name == "gpu" or torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_any_layout_and_both_convolutions(layout, transposed):
    x = LAYOUTS[layout](randn((2, 5, 6, 7)))
    filters = randn((5, 3, 3, 3) if transposed else (3, 5, 3, 3), seed=5)
    options = {"transposed": transposed, "relu": True, "padding": 1}
    kept, again = (outcomes("instance", x, None, filters, again=again, **options) for again in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))


def chain(x: torch.Tensor, leaves: list[torch.Tensor], again: bool, blocks: int = 3) -> torch.Tensor:
    """A norm, then residual blocks of one convolution, each of whose inputs is used twice, and a last convolution."""
    weight, bias, filters = leaves

    def norm(x: torch.Tensor, **options: Any) -> torch.Tensor:
        return normalise("instance", x, weight, bias, again=again, padding=1, **options)

    y = norm(x, relu=True)
    for _ in range(blocks):
        y = norm(convolution(y, filters), residual=y)
    return convolution(y, filters)


def chain_leaves(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    leaves = [*parameters(4, device), randn((4, 4, 3, 3), torch.float32, device, seed=5)]
    return [leaf.to(dtype).requires_grad_() for leaf in leaves]


def kept_bytes(run: Callable[[], torch.Tensor], without: list[torch.Tensor]) -> int:
    """Bytes of the storages that autograd keeps, `without` those."""
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


def test_a_chain_of_blocks_is_run_through_once_and_keeps_no_result(tier):
    x = LAYOUTS["channels_last"](randn((2, 4, 4, 5), torch.float32, tier.device)).requires_grad_()
    leaves = chain_leaves(tier.device)
    dz = randn((2, 4, 4, 5), torch.float32, tier.device, seed=6)
    gradients = []
    for again in (False, True):
        z = chain(x, leaves, again)
        with Ops() as ops:
            gradients.append(torch.autograd.grad(z, [x, *leaves], dz))
        # Once for each of the four results, although each block's builds on the one before.
        assert ops.counts["normalize"] == (4 if again else 0)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    picture, statistics = x.nbytes, 2 * 2 * 4 * 4  # mean and 1/deviation of two samples, four channels, fp32
    # Beside x itself: the other norms' inputs, not one result.
    assert kept_bytes(lambda: chain(x, leaves, True), [x, *leaves]) == 3 * picture + 4 * statistics
    padded = 2 * 4 * 6 * 7 * 4
    assert kept_bytes(lambda: chain(x, leaves, False), [x, *leaves]) == 3 * picture + 4 * statistics + 4 * padded


def test_nothing_stays_behind():
    """Neither after the forward nor after the backward, while the graph is still there."""
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


def test_backward_twice_and_of_some_weights_only():
    x, leaves = randn((2, 4, 6, 7)).requires_grad_(), chain_leaves()
    z = chain(x, leaves, True)
    dz = randn(z.shape, seed=6)
    first = torch.autograd.grad(z, [x, *leaves], dz, retain_graph=True)
    (filters,) = torch.autograd.grad(z, leaves[2:], dz, retain_graph=True)
    again = torch.autograd.grad(z, [x, *leaves], dz)
    assert torch.equal(filters, first[3])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(z, [x, *leaves], dz)


def test_frozen_parts():
    """Where the norm before is no part of the graph, its result is an ordinary tensor."""
    x, (weight, bias, filters) = randn((2, 4, 6, 7)), chain_leaves()
    frozen = [weight.detach(), bias.detach(), filters]
    dz = randn((2, 4, 6, 7), seed=6)
    gradients = [torch.autograd.grad(chain(x, frozen, again), filters, dz)[0] for again in (False, True)]
    assert torch.equal(*gradients)
    # Frozen filters: the gradients pass through them.
    parts = [weight, bias, filters.detach()]
    gradients = [torch.autograd.grad(chain(x, parts, again), [weight, bias], dz) for again in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_result_that_was_written_into_is_kept_as_it_is():
    (weight, bias, filters), x = chain_leaves(), randn((2, 4, 6, 7))
    gradients = []
    for again in (False, True):
        y = normalise("instance", x, weight, bias, again=again)
        with torch.no_grad():
            y.mul_(3)
        z = convolution(y, filters)
        gradients.append(torch.autograd.grad(z, filters, randn(z.shape, seed=6))[0])
    assert torch.equal(*gradients)


def test_other_ops_take_the_result_as_any_tensor():
    x, (weight, bias, filters) = randn((2, 4, 6, 7)), chain_leaves()
    y = normalise("instance", x, weight, bias, relu=True, again=True)
    expected = normalise("instance", x, weight, bias, relu=True, again=False)
    actual, wanted = (
        torch.autograd.grad((t * t).sum() + F.conv2d(t, filters).square().sum(), [weight, bias, filters])
        for t in (y, expected)
    )
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_gradcheck(norm):
    x = randn((2, 4, 4, 3), torch.float64, seed=1).requires_grad_()
    weight, bias, filters = chain_leaves(dtype=torch.float64)

    def run(x, weight, bias, filters):
        y = normalise(norm, x, weight, bias, relu=True, padding=1, again=True)
        z = normalise(norm, convolution(y, filters), weight, bias, residual=y, padding=1, again=True)
        return convolution(z, filters, stride=2)

    assert torch.autograd.gradcheck(run, (x, weight, bias, filters))


def test_running_statistics_move_once():
    x, (weight, bias, filters) = randn((2, 4, 6, 7)), chain_leaves()
    ours, theirs = ([torch.zeros(4), torch.ones(4)] for _ in range(2))
    y = recomputed_batch_norm(x, weight, bias, *ours, momentum=0.3)
    convolution(y, filters).sum().backward()
    batch_norm(x, weight, bias, *theirs, training=True, momentum=0.3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_under_autocast():
    """The convolution runs in bfloat16 and keeps its weights in it, as PyTorch's own; the gradients are fp32."""
    x, leaves, first = randn((2, 4, 9, 8)), chain_leaves(), randn((4, 4, 3, 3), seed=7)
    gradients = []
    for again in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            z = chain(F.conv2d(x, first, padding=1), leaves, again, blocks=0)
        assert z.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(z, leaves, randn(z.shape, z.dtype, seed=6)))
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_a_bias_has_its_gradient():
    x, (weight, bias, filters) = randn((2, 4, 6, 7)), chain_leaves()
    shift = randn((4,), seed=8).requires_grad_()
    gradients = []
    for again in (False, True):
        z = convolution(normalise("instance", x, weight, bias, again=again), filters, shift, padding=1)
        gradients.append(torch.autograd.grad(z, [filters, shift], randn(z.shape, seed=6)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_without_gradients_nothing_is_different():
    x, leaves = randn((2, 4, 6, 7)), chain_leaves()
    with torch.no_grad():
        kept, again = (chain(x, leaves, again) for again in (False, True))
    assert torch.equal(kept, again)
    assert again.grad_fn is None


def test_traced_in_one_graph():
    x, leaves = randn((2, 4, 6, 7)).requires_grad_(), chain_leaves()
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    dz = randn(x.shape, seed=6)
    expected, actual = (torch.autograd.grad(fn(x, leaves, True), [x, *leaves], dz) for fn in (chain, compiled))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_registered_as_pytorch_demands(tier):
    x = LAYOUTS["channels_last"](randn((2, 4, 3, 5), torch.float32, tier.device))
    residual = randn((2, 4, 5, 7), torch.float32, tier.device, seed=3)
    # Statistics per sample, and, which the kernels read in the same way, per channel.
    for shape in [(2, 4), (4,)] if tier.name == "reference" else [(2, 4)]:
        mean, rstd = randn(shape, device=tier.device, seed=1), randn(shape, device=tier.device, seed=2).abs()
        arguments = (x, *parameters(4, tier.device), mean, rstd, residual, True, 2, [1, 0, 2, 1], "reflect")
        torch.library.opcheck(torch.ops.fastnst.normalize, arguments)


def test_bad_input():
    x, one = torch.zeros(2, 4, 6, 7), torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), expected \(4,\)"):
        recomputed_instance_norm(x, torch.ones(3), one)
    with pytest.raises(ValueError, match="training needs more than one value per channel"):
        recomputed_batch_norm(x[:1, :, :1, :1], one, one, torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match=r"running_var has shape \(5,\)"):
        recomputed_batch_norm(x, one, one, torch.zeros(4), torch.ones(5))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("needs_input", [False, True])
def test_a_kept_input_has_its_weights_gradient_from_planes_too(needs_input: bool, with_bias: bool) -> None:
    """A convolution behind no norm, such as that of a picture, which needs no gradient itself."""
    x = LAYOUTS["channels_last"](randn((2, 3, 7, 6), torch.float32, "cpu"))
    filters = LAYOUTS["channels_last"](randn((4, 3, 3, 3), torch.float32, "cpu", seed=5))
    extra = [randn((4,), torch.float32, "cpu", seed=6)] if with_bias else []
    dz = randn((2, 4, 7, 6), torch.float32, "cpu", seed=7)

    def gradients(dtype: torch.dtype, function: Callable[..., torch.Tensor]) -> list[torch.Tensor | None]:
        leaves = [t.clone().to(dtype).requires_grad_(needs_input or t is not x) for t in (x, filters, *extra)]
        function(*leaves, padding=1).backward(dz.to(dtype))
        return [leaf.grad for leaf in leaves]

    with Ops() as ops:
        actual = gradients(torch.float32, convolution)
    assert ops.counts["convolution_backward"] == 1 + needs_input
    peer, truth = gradients(torch.float32, F.conv2d), gradients(torch.float64, F.conv2d)
    assert [grad is None for grad in actual] == [not needs_input, *[False] * (1 + with_bias)]
    for one, other, exact in zip(actual, peer, truth, strict=True):
        if one is not None:
            assert_as_exact_as_torch(one, other, exact, conditioning=4.0)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 1), (2, 1, 4, 5), (3, 5, 70, 3), (1, 64, 9, 9)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_planes_hold_the_same(shape: tuple[int, ...], layout: str) -> None:
    x = LAYOUTS[layout](randn(shape, torch.float32, "cpu"))
    planes = _planes(x)
    assert planes.is_contiguous()
    assert torch.equal(planes, x)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("stride", "padding", "size"), [(1, 0, 6), (2, 0, 7), (2, 1, 6), (1, 1, 2)])
def test_a_weights_gradient_from_planes_is_that_from_pixels(
    stride: int, padding: int, size: int, with_bias: bool
) -> None:
    """On the CPU the input's gradient is taken in NHWC and the weight's in NCHW; both come out in NHWC."""
    x = LAYOUTS["channels_last"](randn((2, 5, size, size), torch.float32, "cpu"))
    filters = LAYOUTS["channels_last"](randn((3, 5, 3, 3), torch.float32, "cpu", seed=5))
    bias = randn((3,), torch.float32, "cpu", seed=6) if with_bias else None
    scale, shift = parameters(5, "cpu")

    def gradients(dtype: torch.dtype, plain: bool) -> tuple[list[torch.Tensor], Ops]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, filters, scale, shift)]
        extra = [] if bias is None else [bias.detach().to(dtype).requires_grad_()]
        # A border, so that the smallest picture has a convolution.
        y = (instance_norm if plain else recomputed_instance_norm)(
            leaves[0], *leaves[2:], padding=1, padding_mode="zeros"
        )
        options = {"stride": stride, "padding": padding}
        with Ops() as ops:
            if plain:
                z = F.conv2d(y, leaves[1], *extra, **options)
            else:
                z = convolution(y, leaves[1], *extra, **options)
            z.backward(randn(tuple(z.shape), torch.float32, "cpu", seed=9).to(dtype))
        return [leaf.grad for leaf in leaves + extra if leaf.grad is not None], ops

    actual, ops = gradients(torch.float32, plain=False)
    peer, _ = gradients(torch.float32, plain=True)
    truth, _ = gradients(torch.float64, plain=True)
    assert ops.counts["convolution_backward"] == 2
    assert actual[1].stride() == filters.stride()
    assert len(actual) == len(truth) == 4 + with_bias
    for name, one, other, exact in zip(("x", "filters", "scale", "shift", "bias"), actual, peer, truth, strict=False):
        assert_as_exact_as_torch(one, other, exact, conditioning=4.0, what=name)
