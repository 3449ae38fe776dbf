"""Reflection padding against NumPy's, its gradient, and its operator."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastnst.models.padding import reflect_pad
from helpers.random_inputs import images


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 25))
def test_reflect_pad_agrees_with_numpy(height: int, width: int, pad: int) -> None:
    x = images(2, 3, height, width)
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="reflect")
    actual = reflect_pad(x, pad)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(actual.numpy(), expected)


@pytest.mark.parametrize("pad", [3, 7])
def test_reflect_pad_gradient(pad: int) -> None:
    x = images(1, 2, 5, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reflect_pad(x, pad), x)


@pytest.mark.parametrize("arguments", [(3, 3), (0, 2)])
def test_mirror_pad_passes_opcheck(arguments: tuple[int, int]) -> None:
    x = images(2, 3, 5, 6, dtype=torch.float64).requires_grad_()
    torch.library.opcheck(torch.ops.fastnst.mirror_pad.default, (x, *arguments))
