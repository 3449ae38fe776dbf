"""Images at the ends of networks in every tier: against PyTorch, its autograd and fp64, and by hand."""

from functools import partial

import numpy as np
import pytest
import torch

from fastnst_kernels import (
    output_to_vgg_input,
    output_to_vgg_input_backward,
    output_to_vgg_input_backward_reference,
    output_to_vgg_input_reference,
    uint8_to_input,
    uint8_to_input_reference,
)
from helpers.kernel_cases import DTYPES, LAYOUTS, check_bad_input, check_op, randn, same_bits, with_dtypes
from helpers.tolerances import assert_as_exact_as_torch

# Sizes and padding: rows that fill vectors and that do not, padding wider than the image, more than one block.
INPUTS = [
    *(((16, 16), 0), ((16, 16), 4), ((16, 16), 40), ((13, 11), 0), ((13, 11), 4), ((5, 3), 7), ((2, 350), 1)),
    *(((1, 1), 0), ((1, 5), 0), ((4, 1), 0)),
]
# Height and width of z, and the window: all of it, one like each architecture's, and one inside.
WINDOWS = [
    ((16, 16), (0, 0, 16, 16)),
    ((13, 86), (0, 0, 13, 86)),
    ((16, 20), (3, 1, 13, 19)),
    ((16, 24), (0, 0, 15, 21)),
    ((11, 32), (2, 8, 8, 16)),
    ((3, 2), (1, 1, 1, 1)),
]
ENDINGS = [(True, 150 / 255, 0.5), (False, 1 / 255, 0.0)]
WINDOW_CASES = [(size, window, ending) for size, window in WINDOWS for ending in ENDINGS]
every_window = pytest.mark.parametrize(("size", "window", "ending", "dtype"), with_dtypes(WINDOW_CASES), ids=str)


def images_of(n, height, width, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator)
    return batch.to(device).permute(0, 3, 1, 2)


def vectors(device="cpu"):
    """mean and gain: different in each channel, of a loss network's size."""
    return torch.tensor([0.5, 0.4, 0.45], device=device), torch.tensor([4.4, -3.0, 5.0], device=device)


def raw(size, dtype, device="cpu", seed=0):
    return LAYOUTS["channels_last"](randn((2, 3, *size), torch.float32, device, seed=seed)).to(dtype)


# Into a network.


@pytest.mark.parametrize(("size", "padding", "dtype"), with_dtypes(INPUTS), ids=str)
def test_uint8_to_input_is_the_formula_with_numpys_padding(tier, size, padding, dtype):
    images, (shift, scale) = images_of(1, *size, tier.device), vectors(tier.device)
    y = uint8_to_input(images, 1 / 255, scale, shift, padding=padding, dtype=dtype)
    border = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    x = torch.from_numpy(np.pad(images.cpu().numpy(), border, mode="reflect")).to(tier.device)

    def formula(kind):
        plain = (x.to(kind) / 255) * scale.to(kind).view(3, 1, 1) + shift.to(kind).view(3, 1, 1)
        return plain.to(dtype) if kind == torch.float32 else plain

    assert_as_exact_as_torch(y, formula(torch.float32), formula(torch.float64))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_uint8_to_input_without_scale_and_shift_is_exact(tier, dtype):
    images = images_of(1, 3, 86, tier.device)
    assert torch.equal(uint8_to_input(images, dtype=dtype), images.to(dtype))


def test_uint8_to_input_by_hand(tier):
    """One row of pixels (0, 1, 2), (3, 4, 5), below it (6, 7, 8), (9, 10, 11); padded by one."""
    images = torch.arange(12, dtype=torch.uint8, device=tier.device).view(1, 2, 2, 3).permute(0, 3, 1, 2)
    scale, shift = (torch.tensor(values, device=tier.device) for values in ([1.0, 2.0, 3.0], [0.0, 1.0, -1.0]))
    y = uint8_to_input(images, 2.0, scale, shift, padding=1)
    assert y[0, 0].tolist() == [[18, 12, 18, 12], [6, 0, 6, 0], [18, 12, 18, 12], [6, 0, 6, 0]]
    assert y[0, 1, 1].tolist() == [17, 5, 17, 5]
    assert y[0, 2, 1, 1:3].tolist() == [11, 29]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uint8_to_input_takes_any_layout(tier, layout):
    images = images_of(2, 5, 8, tier.device)
    assert torch.equal(uint8_to_input(LAYOUTS[layout](images), padding=2), uint8_to_input(images, padding=2))


def test_uint8_to_input_in_fp64():
    images = images_of(1, 4, 5)
    y = uint8_to_input(images, 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(y, images.double() / 3, rtol=1e-15, atol=0)


# From one network into the next.


def by_torch(z, mean, gain, window, tanh, factor, offset, dtype):
    """As a PyTorch user writes it."""
    top, left, height, width = window
    s = z[:, :, top : top + height, left : left + width]
    s = (s.tanh() if tanh else s) * factor + offset
    u = ((s - mean.view(3, 1, 1)) * gain.view(3, 1, 1)).to(dtype)
    vertical = torch.stack([image.diff(dim=1).pow(2).sum() for image in s])
    return u, vertical, torch.stack([image.diff(dim=2).pow(2).sum() for image in s])


@every_window
def test_output_to_vgg_input_agrees_with_torch(tier, size, window, ending, dtype):
    z, (mean, gain) = raw(size, dtype, tier.device), vectors(tier.device)
    tanh, factor, offset = ending
    u, sums = output_to_vgg_input(z, mean, gain, window=window, tanh=tanh, factor=factor, offset=offset, dtype=dtype)
    truth = by_torch(z.double(), mean.double(), gain.double(), window, *ending, torch.float64)
    peer = by_torch(z.float(), mean, gain, window, *ending, dtype)
    assert_as_exact_as_torch(u, peer[0], truth[0])
    for index in (0, 1):
        assert_as_exact_as_torch(sums[:, index], peer[1 + index], truth[1 + index])
    assert sums[:, 2].tolist() == [0.0, 0.0]
    assert (u.dtype, sums.dtype) == (dtype, torch.float32)
    assert u.is_contiguous(memory_format=torch.channels_last)


@every_window
def test_output_to_vgg_input_backward_is_autograds(tier, size, window, ending, dtype):
    """Of the plain formulation in fp64; PyTorch's peer is the same in fp32."""
    variation = (0.0, 0.0) if window == WINDOWS[2][1] else (0.3, 0.7)
    z, (mean, gain) = raw(size, dtype, tier.device), vectors(tier.device)
    du = raw(window[2:], dtype, tier.device, seed=3)
    tanh, factor, _ = ending
    d_variation = torch.tensor(2.5, device=tier.device)

    def wanted(kind):
        leaf = z.to(kind).requires_grad_()
        u, vertical, horizontal = by_torch(leaf, mean.to(kind), gain.to(kind), window, *ending, kind)
        tv = variation[0] * vertical.sum() + variation[1] * horizontal.sum()
        (gradient,) = torch.autograd.grad((u * du.to(kind)).sum() + 2.5 * tv, leaf)
        return gradient

    options = {"window": window, "tanh": tanh, "factor": factor, "variation": variation}
    dz = output_to_vgg_input_backward(z, du, gain, **options, d_variation=d_variation)
    assert_as_exact_as_torch(dz, wanted(torch.float32).to(dtype), wanted(torch.float64))
    assert dz.dtype == dtype
    assert dz.is_contiguous(memory_format=torch.channels_last)
    around = torch.ones_like(dz, dtype=torch.bool)
    around[:, :, window[0] : window[0] + window[2], window[1] : window[1] + window[3]] = False
    assert (dz[around] == 0).all()
    scaled = {**options, "variation": [2.5 * weight for weight in variation]}
    torch.testing.assert_close(output_to_vgg_input_backward(z, du, gain, **scaled), dz)


def test_output_to_vgg_input_in_fp64_is_the_reference():
    """fp64 takes PyTorch's path; gradcheck holds the reference, autograd of it the backward."""
    z = randn((2, 3, 5, 4), torch.float64).requires_grad_()
    mean, gain = (vector.double() for vector in vectors())
    window, du = (1, 0, 4, 3), randn((2, 3, 4, 3), torch.float64, seed=1)
    for tanh, factor, offset in ENDINGS:
        forward = partial(
            output_to_vgg_input_reference,
            **{"mean": mean, "gain": gain, "window": window, "dtype": torch.float64},
            **{"tanh": tanh, "factor": factor, "offset": offset},
        )
        assert torch.autograd.gradcheck(forward, z)
        u, sums = forward(z)
        (wanted,) = torch.autograd.grad((u * du).sum() + (sums[:, :2].sum(0) @ torch.tensor([0.3, 0.7]).double()), z)
        options = {"window": window, "tanh": tanh, "factor": factor, "variation": (0.3, 0.7)}
        dz = output_to_vgg_input_backward(z, du, gain, **options)
        torch.testing.assert_close(dz, wanted, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(dz, output_to_vgg_input_backward_reference(z, du, gain, **options), rtol=0, atol=0)
        assert sums.dtype == torch.float64


def test_output_to_vgg_input_by_hand(tier):
    """One channel of three counts: s = 2z + 1 is (1, 3) above (7, 3), in the left column of a wider z.

    Along the height 6² + 0² = 36, along the width 2² + (−4)² = 20. Their gradient, with weights 1 and 10: above
    −2·6 − 20·2 = −52 and 0 + 20·2 = 40, below 12 + 20·4 = 92 and −80. ds = 3·du + that, dz = 2·ds.
    """
    z = torch.zeros((1, 3, 2, 3), device=tier.device)
    z[0, 0, :, :2] = torch.tensor([[0.0, 1.0], [3.0, 1.0]])
    mean, gain = torch.tensor([1.0, 0.0, 0.0], device=tier.device), torch.tensor([3.0, 1.0, 1.0], device=tier.device)
    window = (0, 0, 2, 2)
    u, sums = output_to_vgg_input(z, mean, gain, window=window, tanh=False, factor=2.0, offset=1.0, dtype=torch.float32)
    assert u[0, 0].tolist() == [[0.0, 6.0], [18.0, 6.0]]
    assert u[0, 1].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert sums.tolist() == [[36.0, 20.0, 0.0]]
    du = torch.ones((1, 3, 2, 2), device=tier.device)
    dz = output_to_vgg_input_backward(z, du, gain, window=window, tanh=False, factor=2.0, variation=(1.0, 10.0))
    assert dz[0, 0].tolist() == [[-98.0, 86.0, 0.0], [190.0, -154.0, 0.0]]
    assert dz[0, 1].tolist() == [[2.0, 2.0, 0.0], [2.0, 2.0, 0.0]]


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [(0, 0), (7, 5), (15, 85)])
def test_output_to_vgg_input_marks_images_with_nan_or_inf(tier, position, value, dtype):
    """A tanh of an infinity is ±1 and no fault, as in PyTorch."""
    z, (mean, gain) = raw((16, 86), dtype, tier.device), vectors(tier.device)
    z[1, 2, *position] = value
    for tanh in (False, True):
        _, sums = output_to_vgg_input(
            *(z, mean, gain), window=(0, 0, 16, 86), tanh=tanh, factor=0.5, offset=0.5, dtype=dtype
        )
        faulty = value != value or not tanh
        assert sums[:, 2].isnan().tolist() == [False, faulty]
        assert sums[0, :2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_to_vgg_input_backward_adds_watch_to_the_window(tier, dtype):
    z, du, (_, gain) = raw((4, 6), dtype, tier.device), raw((3, 5), dtype, tier.device), vectors(tier.device)
    options = {"window": (1, 0, 3, 5), "tanh": True, "factor": 0.5, "variation": (1.0, 1.0)}
    zero, nan = (torch.tensor(value, device=tier.device) for value in (0.0, float("nan")))
    plain = output_to_vgg_input_backward(z, du, gain, **options)
    assert torch.equal(output_to_vgg_input_backward(z, du, gain, **options, watch=zero), plain)
    watched = output_to_vgg_input_backward(z, du, gain, **options, watch=nan)
    assert watched[:, :, 1:, :5].isnan().all()
    assert (watched[:, :, 0] == 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_output_to_vgg_input_takes_any_layout(tier, layout):
    z, du, (mean, gain) = raw((5, 8), torch.float32), raw((4, 8), torch.float32, seed=1), vectors(tier.device)
    z, du = z.to(tier.device), du.to(tier.device)
    ending = {"window": (1, 0, 4, 8), "tanh": True, "factor": 0.5}
    into = {**ending, "offset": 0.5, "dtype": torch.float32}
    other = LAYOUTS[layout](z)
    assert same_bits(output_to_vgg_input(other, mean, gain, **into), output_to_vgg_input(z, mean, gain, **into))
    actual = output_to_vgg_input_backward(other, LAYOUTS[layout](du), gain, **ending)
    assert torch.equal(actual, output_to_vgg_input_backward(z, du, gain, **ending))
    assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_to_vgg_input_gives_the_same_bits_twice(tier, dtype):
    z, (mean, gain) = raw((17, 86), dtype, tier.device), vectors(tier.device)
    ending = {"window": (0, 0, 17, 86), "tanh": True, "factor": 0.5}
    assert same_bits(*(output_to_vgg_input(z, mean, gain, **ending, offset=0.5, dtype=dtype) for _ in range(2)))
    first, again = (output_to_vgg_input_backward(z, z, gain, **ending, variation=(1.0, 2.0)) for _ in range(2))
    assert torch.equal(first, again)


def test_image_ops_pass_opcheck(tier):
    mean, gain = vectors(tier.device)
    window, scalar = [1, 0, 4, 3], torch.tensor(1.5, device=tier.device)
    images = images_of(2, 4, 5, tier.device)
    check_op(torch.ops.fastnst.uint8_to_input, (images, 0.5, gain, mean, 2, torch.bfloat16), tier)
    z, du = raw((5, 4), torch.float16, tier.device), raw((4, 3), torch.float16, tier.device)
    forward = (z, mean, gain, window, True, 0.5, 0.5, torch.float16)
    check_op(torch.ops.fastnst.output_to_vgg_input, forward, tier)
    backward = (z, du, gain, window, True, 0.5, [1.0, 2.0], scalar, scalar)
    check_op(torch.ops.fastnst.output_to_vgg_input_backward, backward, tier)


def test_image_ops_compile_to_one_graph():
    z, (mean, gain), images = raw((5, 4), torch.float32), vectors(), images_of(2, 4, 3)
    ending = {"window": (1, 0, 4, 3), "tanh": True, "factor": 0.5}

    def step(images, z):
        u, sums = output_to_vgg_input(z, mean, gain, **ending, offset=0.5, dtype=torch.float32)
        return output_to_vgg_input_backward(z, u + uint8_to_input(images), gain, **ending, watch=sums.sum())

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(images, z), step(images, z))


GOOD_INPUT = {"images": torch.zeros((2, 3, 4, 5), dtype=torch.uint8)}
GOOD_FORWARD = {
    **{"z": torch.zeros(2, 3, 4, 5), "mean": torch.zeros(3), "gain": torch.ones(3), "window": (0, 1, 4, 4)},
    **{"tanh": True, "factor": 1.0, "offset": 0.0, "dtype": torch.float32},
}
GOOD_BACKWARD = {
    **{"z": torch.zeros(2, 3, 4, 5), "du": torch.zeros(2, 3, 4, 4), "gain": torch.ones(3), "window": (0, 1, 4, 4)},
    **{"tanh": True, "factor": 1.0},
}


@pytest.mark.parametrize(
    ("op", "good", "change", "message"),
    [
        (uint8_to_input, GOOD_INPUT, {"images": torch.zeros(2, 3, 4, 5)}, "images are torch.float32, expected"),
        (uint8_to_input, GOOD_INPUT, {"images": torch.zeros(2, 4, 5, 3).byte()}, r"\(2, 4, 5, 3\), expected \[N, 3"),
        (uint8_to_input, GOOD_INPUT, {"padding": -1}, "padding is -1"),
        (
            *(uint8_to_input, GOOD_INPUT),
            {"images": torch.zeros(1, 3, 1, 5).byte(), "padding": 1},
            "padding is 1 .* 0 if a side has one pixel",
        ),
        (uint8_to_input, GOOD_INPUT, {"dtype": torch.int32}, "dtype is torch.int32"),
        (uint8_to_input, GOOD_INPUT, {"scale": torch.ones(4)}, r"scale has shape \(4,\), expected \(3,\)"),
        (uint8_to_input, GOOD_INPUT, {"shift": torch.ones(3, device="meta")}, "shift is on meta, x on cpu"),
        (
            output_to_vgg_input,
            GOOD_FORWARD,
            {"z": torch.zeros(2, 4, 4, 5)},
            r"z has shape \(2, 4, 4, 5\), expected \[",
        ),
        (output_to_vgg_input, GOOD_FORWARD, {"z": torch.zeros(2, 3, 4, 5).byte()}, "z is torch.uint8"),
        (output_to_vgg_input, GOOD_FORWARD, {"window": (0, 2, 4, 4)}, r"window \(0, 2, 4, 4\) .* is not inside z"),
        (output_to_vgg_input, GOOD_FORWARD, {"window": (0, 2, 4)}, r"window is \(0, 2, 4\), expected \(top, left"),
        (output_to_vgg_input, GOOD_FORWARD, {"window": (0, 0, 0, 4)}, r"window \(0, 0, 0, 4\) .* is not inside"),
        (output_to_vgg_input, GOOD_FORWARD, {"mean": torch.zeros(1)}, r"mean has shape \(1,\)"),
        (output_to_vgg_input, GOOD_FORWARD, {"dtype": torch.uint8}, "dtype is torch.uint8"),
        (
            *(output_to_vgg_input_backward, GOOD_BACKWARD),
            {"du": torch.zeros(2, 3, 4, 5)},
            r"du has shape \(2, 3, 4, 5\), expected \(2, 3, 4, 4\)",
        ),
        (output_to_vgg_input_backward, GOOD_BACKWARD, {"variation": (1.0,)}, r"variation is \(1.0,\), expected two"),
        (output_to_vgg_input_backward, GOOD_BACKWARD, {"watch": torch.zeros(1)}, r"watch is torch.float32 \(1,\)"),
        (
            *(output_to_vgg_input_backward, GOOD_BACKWARD),
            {"d_variation": torch.tensor(1)},
            r"d_variation is torch.int64 \(\), expected one floating number",
        ),
    ],
)
def test_image_ops_refuse_bad_input(op, good, change, message):
    check_bad_input(op, good | change, message)


def test_uint8_to_input_has_no_gradient():
    images, (shift, scale) = images_of(1, 6, 7), vectors()
    y = uint8_to_input(images, 0.5, scale, shift, padding=3)
    assert not y.requires_grad
    assert torch.equal(y, uint8_to_input_reference(images, 0.5, scale, shift, padding=3))
