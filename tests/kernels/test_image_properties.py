"""Properties of images at the ends of networks for any size, window, padding and dtype, exactly.

Values are whole numbers and factors powers of two, so that nothing rounds without tanh: comparisons are for equality.
"""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastnst_kernels import output_to_vgg_input, output_to_vgg_input_backward, uint8_to_input
from helpers.kernel_cases import DTYPES, LAYOUTS, examples, whole_numbers

seeds = st.integers(0, 2**16)
dtypes = st.sampled_from(DTYPES)
# Rows of 3·side numbers that fill vectors and tiles, and that do not.
sides = st.sampled_from([1, 2, 3, 5, 7, 8, 11, 16, 24, 32])
widths = st.one_of(sides, st.sampled_from([85, 86, 88]))


@st.composite
def windows(draw):
    """z's shape and a window of it."""
    height, width = draw(sides), draw(widths)
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    inner = draw(st.integers(1, height - top)), draw(st.integers(1, width - left))
    return (draw(st.integers(1, 2)), 3, height, width), (top, left, *inner)


def channels_last_numbers(shape, dtype, seed, device):
    """-3 to 3, channels_last."""
    return LAYOUTS["channels_last"](whole_numbers(shape, dtype, device, seed))


@examples(16, interpreted=10)
@given(height=sides, width=sides, padding=st.integers(0, 9), dtype=dtypes, seed=seeds)
def test_uint8_to_input_pads_as_numpy(tier, height, width, padding, dtype, seed):
    padding = padding if min(height, width) > 1 else 0
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8, generator=generator)
    y = uint8_to_input(batch.to(tier.device).permute(0, 3, 1, 2), 0.25, padding=padding, dtype=dtype)
    around = (padding, padding)
    expected = np.pad(batch.numpy(), ((0, 0), around, around, (0, 0)), mode="reflect")
    assert torch.equal(4 * y.permute(0, 2, 3, 1).cpu().float(), torch.from_numpy(expected).float())


@examples(32, interpreted=12)
@given(case=windows(), dtype=dtypes, seed=seeds)
def test_output_to_vgg_input_of_any_window(tier, case, dtype, seed):
    shape, window = case
    z = channels_last_numbers(shape, dtype, seed, tier.device)
    mean, gain = (torch.tensor(values, device=tier.device) for values in ([1.0, -1.0, 0.0], [2.0, 1.0, -0.5]))
    u, sums = output_to_vgg_input(z, mean, gain, window=window, tanh=False, factor=0.5, offset=1.0, dtype=dtype)
    top, left, height, width = window
    s = z.double()[:, :, top : top + height, left : left + width] / 2 + 1
    assert torch.equal(u.double(), (s - mean.double().view(3, 1, 1)) * gain.double().view(3, 1, 1))
    expected = [s.diff(dim=2).square().sum((1, 2, 3)), s.diff(dim=3).square().sum((1, 2, 3))]
    assert torch.equal(sums.double(), torch.stack([*expected, torch.zeros_like(expected[0])], 1))


@examples(32, interpreted=12)
@given(case=windows(), dtype=dtypes, seed=seeds, variation=st.sampled_from([(0.0, 0.0), (1.0, 2.0), (0.0, 0.5)]))
def test_output_to_vgg_input_backward_of_any_window(tier, case, dtype, seed, variation):
    """Against autograd in fp64."""
    shape, window = case
    z = channels_last_numbers(shape, dtype, seed, tier.device)
    top, left, height, width = window
    du = channels_last_numbers((shape[0], 3, height, width), dtype, seed + 1, tier.device)
    gain = torch.tensor([2.0, 1.0, -1.0], device=tier.device)
    dz = output_to_vgg_input_backward(z, du, gain, window=window, tanh=False, factor=2.0, variation=variation)
    leaf = z.double().requires_grad_()
    s = 2 * leaf[:, :, top : top + height, left : left + width]
    loss = (s * gain.double().view(3, 1, 1) * du.double()).sum()
    loss = loss + variation[0] * s.diff(dim=2).square().sum() + variation[1] * s.diff(dim=3).square().sum()
    (expected,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(dz.double(), expected)
