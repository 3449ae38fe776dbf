"""What the kernels of pictures at the ends of networks move, counted."""

import pytest
import torch
from byte_counter import count_bytes
from kernel_cases import DTYPES, LAYOUTS, randn

from fastnst_kernels import network_boundary, network_boundary_backward, picture_input, pictures_kernels


def in_interpreter(test):
    """Runs `test`, which need not ask for the fixture `tier`, in the interpreter's tier alone."""
    return pytest.mark.parametrize("tier", ["interpreter"], indirect=True)(pytest.mark.usefixtures("tier")(test))


@in_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [0, 4, 20])
def test_input_reads_each_byte_and_writes_each_number(padding, dtype):
    """Beside what the border mirrors, which is read again, every byte of the picture is read once."""
    pictures = torch.arange(12 * 24 * 3).to(torch.uint8).view(1, 12, 24, 3).permute(0, 3, 1, 2)
    with count_bytes() as traffic:
        y = picture_input(pictures, 1 / 255, padding=padding, dtype=dtype)
    assert traffic.launches == 1
    assert traffic.stored == traffic.unique_stored == y.numel() * y.element_size()
    assert traffic.unique_loaded == pictures.numel()
    assert traffic.loaded == y.numel()


@in_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_tensor_at_the_boundary_comes_and_goes_once(dtype):
    z, mean, gain = LAYOUTS["channels_last"](randn((2, 3, 16, 172), dtype)), torch.rand(3), torch.rand(3)
    ending = {"window": (0, 0, 16, 172), "tanh": True, "factor": 0.5}
    size = z.numel() * z.element_size()
    with count_bytes() as traffic:
        u, _ = network_boundary(z, mean, gain, **ending, offset=0.5, dtype=dtype)
    programs = 2 * 2 * 3  # pictures · strips of 8 rows · tiles of 256 numbers in a row of 516
    assert traffic.launches == 1
    assert traffic.stored == traffic.unique_stored == size + programs * 3 * 4
    assert traffic.unique_loaded == size + 6 * 4
    # One neighbour below and one to the right of each number come from a cache.
    assert traffic.loaded_within(z) < 3 * size
    with count_bytes() as traffic:
        network_boundary_backward(z, u, gain, **ending, variation=(1.0, 1.0))
    assert traffic.launches == 1
    assert traffic.stored == traffic.unique_stored == size
    assert traffic.unique_loaded == 2 * size + 3 * 4
    assert traffic.loaded_within(z) < 5 * size
    assert traffic.loaded_within(u) == size


def test_what_the_kernels_cannot_count():
    """Without memory, as the check comes before the launch."""
    z = torch.empty((1, 3, 2, 2**27), device="meta")
    with pytest.raises(ValueError, match=r"z has shape \(1, 3, 2, 134217728\): .* of 3623878656 numbers in 9 rows"):
        pictures_kernels.boundary(z, z, z, z, (0, 0, 2, 2**27), True, 1.0, 0.0)
