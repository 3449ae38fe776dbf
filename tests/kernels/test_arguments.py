"""What every op makes of its arguments: memory formats as in PyTorch, and an error that names a wrong argument."""

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import fastnst_kernels
from fastnst_kernels import max_pool2d_switches, max_unpool2d_switches, runtime
from fastnst_kernels.conv.convolution import convolution
from fastnst_kernels.norm.recompute import recomputed_batch_norm, recomputed_instance_norm
from helpers.kernels.kernel_cases import LAYOUTS, check_op, randn

NAN, INF = float("nan"), float("inf")
LAST = LAYOUTS["channels_last"](randn((2, 6, 4, 5)))
# Each is what PyTorch's elementwise ops take it for.
FORMATS = {
    "every second channel": LAST[:, ::2],
    "first channel": LAST[:, :1],
    "first column": LAST[..., :1],
    "first row": LAST[:, :, :1],
    "first pixel": LAST[:, :, :1, :1],
    "rows of channels": randn((2, 4, 6)).mT.unsqueeze(3),
    "columns of channels": randn((2, 5, 6)).mT.unsqueeze(2),
    "a column": randn((2, 6, 4, 1)),
    "a row": randn((2, 6, 1, 5)),
    "a pixel": randn((2, 6, 1, 1)),
    "every second column": LAST[..., ::2],
    "one sample, expanded": LAST[:1].expand(3, -1, -1, -1),
    "one channel, expanded": randn((2, 1, 4, 5)).expand(-1, 6, -1, -1),
    "one pixel, expanded": randn((2, 6, 1, 1)).expand(-1, -1, 4, 5),
}


def instance_norm(x: torch.Tensor, **options: Any) -> torch.Tensor:
    return fastnst_kernels.instance_norm(x, torch.ones(x.shape[1]), torch.zeros(x.shape[1]), **options)


@pytest.mark.parametrize("name", FORMATS)
def test_ops_keep_the_memory_format_of_torch(tier, name):
    x = FORMATS[name].to(tier.device).detach().requires_grad_()
    peer = x.detach().relu()  # elementwise; PyTorch's norms also take a gap behind a row for another format
    affine = [torch.ones(x.shape[1], device=tier.device), torch.zeros(x.shape[1], device=tier.device)]
    results = {
        "instance norm": fastnst_kernels.instance_norm(x, *affine, relu=True),
        "batch norm": fastnst_kernels.batch_norm(x, *affine, *(t.clone() for t in affine), training=True),
        "recomputed norm": recomputed_instance_norm(x, *affine, residual=x.detach()),
        "recomputed batch norm": recomputed_batch_norm(x, *affine, *(t.clone() for t in affine)),
        "pool": max_pool2d_switches(x, 1, 1)[0],
        "switches": max_pool2d_switches(x, 1, 1)[1],
        "loss": fastnst_kernels.loss_relu_backward(x, incoming=x.detach()),
    }
    results["unpool"] = max_unpool2d_switches(results["pool"], results["switches"], tuple(x.shape[2:]), 1, 1)
    for op, y in results.items():
        assert y.stride() == peer.stride(), op
        if y.requires_grad:
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
            assert dx.stride() == peer.stride(), op
    gram = fastnst_kernels.gram_matrix(x)
    assert torch.autograd.grad(gram.sum(), x)[0].stride() == peer.stride()
    torch.testing.assert_close(gram, fastnst_kernels.gram_matrix(x.detach().contiguous()))


@pytest.mark.parametrize("name", FORMATS)
def test_op_with_any_strides_passes_opcheck(tier, name):
    """What is traced has the strides of what is computed."""
    x = FORMATS[name].to(tier.device).detach().requires_grad_()
    affine = [torch.ones(x.shape[1], device=tier.device), torch.zeros(x.shape[1], device=tier.device)]
    check_op(torch.ops.fastnst.norm, (x, *affine, [], None, True, 1e-5, False, [1, 0, 0, 0, 0, 0]), tier)
    check_op(torch.ops.fastnst.max_pool2d_switches, (x, 1, 1), tier)


@pytest.mark.parametrize("name", FORMATS)
def test_convolution_keeps_the_memory_format_of_torch(name):
    """Of the result with and without gradients, of both gradients, and behind a norm that is recomputed."""
    for wrap in (lambda x: x, lambda x: recomputed_instance_norm(x, torch.ones(x.shape[1]), torch.zeros(x.shape[1]))):
        strides = []
        for conv in (convolution, F.conv2d):
            x = FORMATS[name].detach().requires_grad_()
            filters = LAYOUTS["channels_last"](randn((8, x.shape[1], 3, 3), seed=1)).requires_grad_()
            z = conv(wrap(x), filters, padding=1)
            with torch.no_grad():
                plain = conv(wrap(x), filters, padding=1)
            found = (plain, z, *torch.autograd.grad(z.sum(), [x, filters]))
            strides.append(
                [[stride for stride, side in zip(t.stride(), t.shape, strict=True) if side > 1] for t in found]
            )
        assert strides[0] == strides[1]


OPS: dict[str, dict[str, Any]] = {
    "instance_norm": {"x": LAST, "weight": torch.ones(6), "bias": torch.zeros(6), "residual": LAST},
    "batch_norm": {
        "x": LAST, "weight": torch.ones(6), "bias": torch.zeros(6), "running_mean": torch.zeros(6),
        "running_var": torch.ones(6), "residual": LAST, "training": True,
    },
    "gram_matrix": {"features": LAST},
    "style_loss": {"features": LAST, "target_gram": torch.eye(6)},
    "style_loss_and_matrix": {"features": LAST, "target_gram": torch.eye(6)},
    "loss_relu_backward": {
        "features": LAST, "incoming": LAST, "content_target": LAST, "content_factor": torch.ones(2),
    },
    "max_pool2d_switches": {"x": LAST},
    "max_unpool2d_switches": {
        "y": LAST[:, :, :2, :2], "switches": torch.zeros((2, 6, 2, 2), dtype=torch.uint8), "output_size": (4, 5),
    },
    "uint8_to_input": {
        "images": torch.zeros((2, 3, 4, 5), dtype=torch.uint8), "scale": torch.ones(3), "shift": torch.zeros(3),
    },
    "output_to_vgg_input": {
        "z": LAST[:, :3], "mean": torch.zeros(3), "gain": torch.ones(3), "window": (0, 0, 4, 5), "tanh": True,
        "factor": 0.5, "offset": 0.5, "dtype": torch.float32,
    },
    "output_to_vgg_input_backward": {
        "z": LAST[:, :3], "du": LAST[:, :3], "gain": torch.ones(3), "window": (0, 0, 4, 5), "tanh": True,
        "factor": 0.5, "d_variation": torch.tensor(1.0), "watch": torch.tensor(0.0),
    },
}  # fmt: skip
OPTIONAL = ("residual", "incoming", "content_target", "content_factor", "scale", "shift", "d_variation", "watch")
TENSORS = [
    (op, name) for op, arguments in OPS.items() for name, value in arguments.items() if torch.is_tensor(value)
]  # fmt: skip


def not_dense_numbers(good: torch.Tensor, name: str) -> list[Any]:
    """What is not a dense tensor of the right kind of numbers."""
    with np.errstate(all="ignore"):
        quantized = torch.quantize_per_tensor(good.float(), 0.1, 0, torch.quint8)
    wrong = [
        good.tolist(),
        good.numpy(),
        1.0,
        good.to_sparse(),
        quantized,
        good.to(torch.complex64),
        good.to(torch.int32),
    ]
    wrong += [good.to(torch.float8_e4m3fn)] if good.dim() else []
    return wrong if name in OPTIONAL else [None, *wrong]


@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz:UserWarning", "ignore:.*[Qq]uantiz:DeprecationWarning")
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_op_names_an_argument_that_is_no_dense_tensor(op, name):
    function, good = getattr(fastnst_kernels, op), OPS[op]
    function(**good)
    for wrong in not_dense_numbers(good[name], name):
        with pytest.raises(ValueError, match=rf"^{name} (is|are|has)\b.*, expected "):
            function(**good | {name: wrong})


NUMBERS = [
    *(
        (op, {"eps": value}, "eps is")
        for op in ("instance_norm", "batch_norm")
        for value in (-1e-5, NAN, INF, None, "1")
    ),
    *(("batch_norm", {"momentum": value}, "momentum is") for value in (-0.1, 1.1, NAN, None)),
    *(("batch_norm", {"momentum": NAN, "training": False}, "momentum is") for _ in range(1)),
    *(("instance_norm", {"padding": value}, "padding is") for value in (1.0, (1, 1, 1), (0, 0, 0, 1.0), -1, None)),
    *(("instance_norm", {"upsample": value}, "upsample is") for value in (2.0, 3, True, None)),
    *(("max_pool2d_switches", {"kernel_size": value}, "kernel_size is") for value in (2.0, (2, 2), 0, None)),
    *(("max_pool2d_switches", {"stride": value}, "stride is") for value in (2.0, (1, 2), 0, None)),
    *(("max_unpool2d_switches", {"output_size": value}, "output_size is") for value in ((4.0, 5), (4,), (4, 5, 6))),
    *(("uint8_to_input", {"factor": value}, "factor is") for value in (NAN, INF, None)),
    *(("uint8_to_input", {"padding": value}, "padding is") for value in (1.0, (1, 1), -1)),
    *(("output_to_vgg_input", {name: NAN}, f"{name} is") for name in ("factor", "offset")),
    *(("output_to_vgg_input", {"window": value}, "window") for value in ((0, 0, 4.0, 5), (0, 0, 4), (0, 0, 5, 5))),
    *(("output_to_vgg_input_backward", change, "is nan") for change in ({"factor": NAN}, {"variation": (0.0, NAN)})),
]


@pytest.mark.parametrize(("op", "change", "message"), NUMBERS, ids=str)
def test_op_names_a_number_out_of_range(op, change, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(message) if message != 'is nan' else '.* is nan'}"):
        getattr(fastnst_kernels, op)(**OPS[op] | change)


@pytest.mark.parametrize("norm", [recomputed_instance_norm, recomputed_batch_norm])
def test_recomputed_norm_names_a_number_out_of_range(norm):
    affine = (torch.ones(6).requires_grad_(), torch.zeros(6))
    running = (torch.zeros(6), torch.ones(6)) if norm is recomputed_batch_norm else ()
    with pytest.raises(ValueError, match=r"eps is -1\.0, expected at least 0"):
        norm(LAST, *affine, *running, eps=-1.0)
    if running:
        with pytest.raises(ValueError, match="momentum is 2, expected 0 to 1"):
            norm(LAST, *affine, *running, momentum=2)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by PyTorch's own forward mode
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_op_drops_no_forward_mode_tangent(op, name):
    good = OPS[op][name]
    if not good.is_floating_point():
        return
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(good, torch.ones_like(good))
        if op in ("gram_matrix", "style_loss"):
            assert forward_ad.unpack_dual(getattr(fastnst_kernels, op)(**OPS[op] | {name: dual})).tangent.any()
            return
        with pytest.raises(ValueError, match=f"{name} has a forward-mode tangent, which this op would drop"):
            getattr(fastnst_kernels, op)(**OPS[op] | {name: dual})


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_op_drops_no_forward_mode_tangent_of_a_gradient(tier):
    x = LAST.to(tier.device).detach().requires_grad_()
    affine = torch.ones(6, device=tier.device), torch.zeros(6, device=tier.device)
    pooled, switches = max_pool2d_switches(x)
    unpooled = max_unpool2d_switches(x, switches.new_zeros(x.shape), (8, 10))
    for y in (fastnst_kernels.instance_norm(x, *affine), pooled, unpooled):
        with forward_ad.dual_level(), pytest.raises(ValueError, match="the gradient has a forward-mode tangent"):
            torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))
    for function in (
        fastnst_kernels.gram_matrix,
        lambda f: fastnst_kernels.style_loss(f, torch.eye(6, device=f.device)),
    ):
        y = function(x)
        with forward_ad.dual_level():
            dy = forward_ad.make_dual(torch.zeros_like(y), torch.ones_like(y))
            (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
            tangent = forward_ad.unpack_dual(dx).tangent
        torch.testing.assert_close(tangent, torch.autograd.grad(y, x, torch.ones_like(y))[0])


@pytest.mark.parametrize("recomputed", [False, True])
def test_norm_has_no_second_derivative_and_says_so(tier, recomputed):
    x = LAST.to(tier.device).detach().requires_grad_()
    norm = recomputed_instance_norm if recomputed else fastnst_kernels.instance_norm
    y = norm(x, torch.ones(6, device=tier.device), torch.zeros(6, device=tier.device))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula was registered|once_differentiable"):
        dx.sum().backward()


def test_check_number_takes_numbers_of_numpy_and_the_ends_of_a_range():
    for value in (0, 1, 0.5, np.float32(0.25), np.int64(1)):
        runtime.check_number("share", value, 0.0, 1.0)
