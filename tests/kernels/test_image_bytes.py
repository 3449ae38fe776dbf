"""Bytes that the kernels of images at the ends of networks move, counted."""

import pytest
import torch

from fastnst_kernels import (
    output_to_vgg_input,
    output_to_vgg_input_backward,
    output_to_vgg_input_backward_reference,
    output_to_vgg_input_reference,
    uint8_to_input,
)
from fastnst_kernels.image import kernels as image_kernels
from helpers.byte_counter import count_bytes
from helpers.kernel_cases import DTYPES, LAYOUTS, in_interpreter, randn
from helpers.last_program import LastProgram


@in_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [0, 4, 20])
def test_uint8_to_input_moves_each_byte_once(padding, dtype):
    """Every byte of the image is read once, those that the padding mirrors again."""
    images = torch.arange(12 * 24 * 3).to(torch.uint8).view(1, 12, 24, 3).permute(0, 3, 1, 2)
    with count_bytes() as traffic:
        y = uint8_to_input(images, 1 / 255, padding=padding, dtype=dtype)
    assert traffic.launches == 1
    assert traffic.stored == traffic.unique_stored == y.numel() * y.element_size()
    assert traffic.unique_loaded == images.numel()
    assert traffic.loaded == y.numel()


@in_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_to_vgg_input_moves_each_tensor_once(dtype):
    z, mean, gain = LAYOUTS["channels_last"](randn((2, 3, 16, 172), dtype)), torch.rand(3), torch.rand(3)
    ending = {"window": (0, 0, 16, 172), "tanh": True, "factor": 0.5}
    size = z.numel() * z.element_size()
    with count_bytes() as traffic:
        u, _ = output_to_vgg_input(z, mean, gain, **ending, offset=0.5, dtype=dtype)
    programs = 2 * 2 * 3  # images · strips of 8 rows · tiles of 256 numbers in a row of 516
    assert traffic.launches == 1
    assert traffic.stored == traffic.unique_stored == size + programs * 3 * 4
    assert traffic.unique_loaded == size + 6 * 4
    # One neighbour below and one to the right of each number come from a cache.
    assert traffic.loaded_within(z) < 3 * size
    with count_bytes() as traffic:
        output_to_vgg_input_backward(z, u, gain, **ending, variation=(1.0, 1.0))
    assert traffic.launches == 1
    assert traffic.stored == traffic.unique_stored == size
    assert traffic.unique_loaded == 2 * size + 3 * 4
    assert traffic.loaded_within(z) < 5 * size
    assert traffic.loaded_within(u) == size


@in_interpreter
def test_image_kernels_beyond_32_bits(monkeypatch):
    """The last program alone, at the end of 2.16·10⁹ numbers, where an overflowed offset finds nothing."""
    for name in [name for name in vars(image_kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(image_kernels, name, LastProgram(getattr(image_kernels, name)))
    side, n = 15504, 3
    shape = (n, side, side, 3)
    z, u, dz = (torch.empty(shape, dtype=torch.bfloat16).permute(0, 3, 1, 2) for _ in range(3))
    assert z.numel() > 2**31
    images = torch.empty(shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    mean, gain = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([4.0, -3.0, 2.0])
    window, ending = (0, 0, side, side), {"tanh": True, "factor": 0.5}
    corner = (slice(-1, None), slice(None), slice(-2, None), slice(-3, None))
    z[corner] = randn((1, 3, 2, 3), torch.bfloat16)
    images[corner] = torch.arange(18, dtype=torch.uint8).view(1, 3, 2, 3)
    image_kernels.output_to_vgg_input(z, mean, gain, u, window, True, 0.5, 0.5)
    small = {"window": (0, 0, 2, 3), **ending}
    made, _ = output_to_vgg_input_reference(z[corner], mean, gain, **small, offset=0.5, dtype=torch.bfloat16)
    torch.testing.assert_close(u[corner], made)
    image_kernels.output_to_vgg_input_backward(z, u, gain, dz, window, True, 0.5, (1.0, 2.0), None, None)
    made = output_to_vgg_input_backward_reference(z[corner], u[corner], gain, **small, variation=(1.0, 2.0))
    # The corner's upper row and left column have neighbours outside of it.
    torch.testing.assert_close(dz[-1, :, -1, -2:], made[0, :, -1, -2:])
    image_kernels.uint8_to_input(images, 2.0, None, None, u, 0)
    assert u[-1, :, -1, -3:].tolist() == [[6.0, 8.0, 10.0], [18.0, 20.0, 22.0], [30.0, 32.0, 34.0]]


def test_image_kernels_refuse_what_32_bits_cannot_count():
    """Without memory, as the check comes before the launch."""
    z = torch.empty((1, 3, 2, 2**27), device="meta")
    with pytest.raises(ValueError, match=r"z has shape \(1, 3, 2, 134217728\): .* of 3623878656 numbers in 9 rows"):
        image_kernels.output_to_vgg_input(z, z, z, z, (0, 0, 2, 2**27), True, 1.0, 0.0)
