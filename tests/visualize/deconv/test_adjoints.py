"""Adjoints: by hand, and as operators."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnst.models.padding import reflect_pad
from fastnst.visualize.deconv.adjoints import conv2d_adjoint, doubling_conv_transpose2d_adjoint, reflect_pad_adjoint
from helpers.tiny_transform_nets import random_values


def test_conv2d_adjoint_strided_by_hand() -> None:
    weight = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    y = torch.tensor([[[[1.0, 10.0]]]])
    expected = torch.tensor([[1.0, 2, 13, 20, 30], [4, 5, 46, 50, 60], [7, 8, 79, 80, 90]])
    assert torch.equal(conv2d_adjoint(y, weight, (3, 5), stride=2)[0, 0], expected)
    # A sixth column gives the same two results, and no filter saw it.
    assert torch.equal(conv2d_adjoint(y, weight, (3, 6), stride=2)[0, 0], F.pad(expected, (0, 1)))


def test_doubling_conv_transpose2d_adjoint_by_hand() -> None:
    weight = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    y = torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]])
    # One pixel reaches four: with 1, 2, 4 and 5.
    assert doubling_conv_transpose2d_adjoint(y, weight)[0, 0].tolist() == [[1 + 20 + 400 + 5000]]


def test_reflect_pad_adjoint_of_repeated_reflections_by_hand() -> None:
    # a b, reflected by 3: b a b a b a b a.
    assert reflect_pad_adjoint(torch.ones(1, 1, 8, 8), 3)[0, 0].tolist() == [[16, 16], [16, 16]]
    y = torch.zeros(1, 1, 8, 8)
    y[0, 0, 3] = torch.arange(8.0)
    assert reflect_pad_adjoint(y, 3)[0, 0].tolist() == [[1 + 3 + 5 + 7, 0 + 2 + 4 + 6], [0, 0]]


@settings(max_examples=40)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 40))
def test_reflect_pad_adjoint_is_exact(height: int, width: int, pad: int) -> None:
    x = random_values(1, 2, height, width).contiguous(memory_format=torch.channels_last)
    y = random_values(1, 2, height + 2 * pad, width + 2 * pad, seed=1).contiguous(memory_format=torch.channels_last)
    before = y.clone()
    up, down = (reflect_pad(x, pad) * y).sum(), (x * reflect_pad_adjoint(y, pad)).sum()
    assert abs(float(up - down)) <= 1e-12 * float(y.norm() * reflect_pad(x, pad).norm())
    assert torch.equal(y, before)
