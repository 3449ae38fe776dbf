"""What pictures at the ends of networks must satisfy for any size, window, border and type, exactly.

Values are whole numbers and factors powers of two, so that nothing rounds where act is nothing: comparisons are for
equality.
"""

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastnst_kernels import network_boundary, network_boundary_backward, picture_input
from helpers.kernel_cases import DTYPES

# Both fixtures, the tier and the poisoned allocations, may well last for all of a test's examples.
cases = settings(
    max_examples=32, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

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


def whole_numbers(shape, dtype, seed, device):
    """-3 to 3, channels_last."""
    values = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device, dtype).contiguous(memory_format=torch.channels_last)


@settings(cases, max_examples=16)
@given(height=sides, width=sides, padding=st.integers(0, 9), dtype=dtypes, seed=seeds)
def test_a_border_is_numpys_reflection(tier, height, width, padding, dtype, seed):
    padding = padding if min(height, width) > 1 else 0
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8, generator=generator)
    y = picture_input(batch.to(tier.device).permute(0, 3, 1, 2), 0.25, padding=padding, dtype=dtype)
    around = (padding, padding)
    expected = np.pad(batch.numpy(), ((0, 0), around, around, (0, 0)), mode="reflect")
    assert torch.equal(4 * y.permute(0, 2, 3, 1).cpu().float(), torch.from_numpy(expected).float())


@cases
@given(case=windows(), dtype=dtypes, seed=seeds)
def test_the_boundary_counts_every_difference(tier, case, dtype, seed):
    shape, window = case
    z = whole_numbers(shape, dtype, seed, tier.device)
    mean, gain = (torch.tensor(values, device=tier.device) for values in ([1.0, -1.0, 0.0], [2.0, 1.0, -0.5]))
    u, sums = network_boundary(z, mean, gain, window=window, tanh=False, factor=0.5, offset=1.0, dtype=dtype)
    top, left, height, width = window
    s = z.double()[:, :, top : top + height, left : left + width] / 2 + 1
    assert torch.equal(u.double(), (s - mean.double().view(3, 1, 1)) * gain.double().view(3, 1, 1))
    expected = [s.diff(dim=2).square().sum((1, 2, 3)), s.diff(dim=3).square().sum((1, 2, 3))]
    assert torch.equal(sums.double(), torch.stack([*expected, torch.zeros_like(expected[0])], 1))


@cases
@given(case=windows(), dtype=dtypes, seed=seeds, variation=st.sampled_from([(0.0, 0.0), (1.0, 2.0), (0.0, 0.5)]))
def test_the_backward_is_the_gradient(tier, case, dtype, seed, variation):
    """Against autograd in fp64."""
    shape, window = case
    z = whole_numbers(shape, dtype, seed, tier.device)
    top, left, height, width = window
    du = whole_numbers((shape[0], 3, height, width), dtype, seed + 1, tier.device)
    gain = torch.tensor([2.0, 1.0, -1.0], device=tier.device)
    dz = network_boundary_backward(z, du, gain, window=window, tanh=False, factor=2.0, variation=variation)
    leaf = z.double().requires_grad_()
    s = 2 * leaf[:, :, top : top + height, left : left + width]
    loss = (s * gain.double().view(3, 1, 1) * du.double()).sum()
    loss = loss + variation[0] * s.diff(dim=2).square().sum() + variation[1] * s.diff(dim=3).square().sum()
    (expected,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(dz.double(), expected)
