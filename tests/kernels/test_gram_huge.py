"""Offsets beyond 2³¹: the last program of each launch on a tensor with pages only where it accesses."""

import numpy as np
import pytest
import torch

from fastnst_kernels import runtime
from fastnst_kernels.gram import kernels as gram_kernels
from fastnst_kernels.gram import loss_relu_backward, product
from fastnst_kernels.gram.kernels import gram_on_triton
from fastnst_kernels.gram.product import product_on_triton
from helpers.kernel_cases import in_interpreter
from helpers.last_program import LastProgram

# More than 2³¹ elements; in the contiguous format the rows of one tile of 128 channels are that far apart, too.
CHANNELS_LAST, CONTIGUOUS = (2, 64, 4096, 4104), (1, 128, 4200, 4200)
LAYOUTS = pytest.mark.parametrize("shape", [CHANNELS_LAST, CONTIGUOUS], ids=["channels_last", "contiguous"])
POSITIONS = 128  # that hold anything, at the end


def zeros(shape, dtype):
    """Zeros that take up address space, and memory once they are written to."""
    size = {torch.bfloat16: np.int16, torch.float32: np.int32}[dtype]
    return torch.from_numpy(np.zeros(tuple(shape), size)).view(dtype)


@pytest.fixture
def huge(monkeypatch):
    """`kernel(module, name)` replaces a kernel by its last program; nothing fills or copies whole tensors."""
    from triton.runtime import interpreter

    monkeypatch.setattr(runtime, "allocate", lambda shape, like, dtype=None: zeros(shape, dtype or like.dtype))
    # It would copy each argument onto itself.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)

    def replace(module, name):
        last = LastProgram(getattr(module, name))
        monkeypatch.setattr(module, name, last)
        return last

    return replace


def tensor(shape, seed):
    """`(x, end)`: x is zero but for its last sample's last positions, `end [POSITIONS, C]`."""
    n, c, h, w = shape
    x = (
        zeros((n, h, w, c), torch.bfloat16).permute(0, 3, 1, 2)
        if shape == CHANNELS_LAST
        else zeros(shape, torch.bfloat16)
    )
    assert x.numel() > 2**31
    end = torch.randint(-3, 4, (POSITIONS, c), generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    end_of(x).copy_(end)
    return x, end.float()


def end_of(x):
    """The last sample's last positions, `[POSITIONS, C]`."""
    if runtime.memory_format_of(x) == torch.channels_last:
        return x[-1].permute(1, 2, 0).flatten(0, 1)[-POSITIONS:]
    return x[-1].flatten(1)[:, -POSITIONS:].mT


@in_interpreter
@LAYOUTS
def test_gram_kernels_beyond_32_bits(huge, shape, monkeypatch):
    """The last split holds the last positions; the merge's last tile is the last one of the last sample."""
    first, merge = huge(gram_kernels, "_gram_kernel"), huge(gram_kernels, "_merge_gram_kernel")
    _, c, h, w = shape
    chunk = h * w - POSITIONS
    assert chunk % 128 == 0 or shape == CONTIGUOUS
    monkeypatch.setattr(gram_kernels, "positions_per_split", lambda *_: chunk)
    features, end = tensor(shape, 1)
    gram = gram_on_triton(features, None)[0]
    partial = first.arguments["result"]
    assert torch.equal(partial[-1, -1, 0, :32, :c], (end.mT @ end)[:32])
    assert merge.arguments["partial"] is partial
    expected = (end.mT @ end)[-32:, -32:] / (c * h * w)
    torch.testing.assert_close(gram[-1, -32:, -32:], expected)


@in_interpreter
@LAYOUTS
def test_product_kernel_beyond_32_bits(huge, shape):
    huge(product, "_product_kernel")
    n, c = shape[:2]
    features, end = tensor(shape, 1)
    incoming, end_of_incoming = tensor(shape, 2)
    content, end_of_content = tensor(shape, 3)
    matrix = torch.eye(c, dtype=torch.bfloat16).expand(n, c, c).contiguous()
    factor = torch.ones(n)
    result = product_on_triton(
        features, matrix, None, factor, 2.0,
        masked=True, incoming=incoming, content_target=content, content_factor=factor,
    )  # fmt: skip
    expected = torch.where(end > 0, 2 * end + end_of_incoming + end - end_of_content, 0.0)
    # The last tile of positions need not be a whole one.
    assert torch.equal(end_of(result)[-8:, -64:].float(), expected[-8:, -64:])


@in_interpreter
@LAYOUTS
def test_loss_relu_kernel_beyond_32_bits(huge, shape):
    huge(loss_relu_backward, "_loss_relu_kernel")
    features, end = tensor(shape, 1)
    incoming, end_of_incoming = tensor(shape, 2)
    result = loss_relu_backward._loss_relu_on_triton(features, incoming, None, None)
    expected = torch.where(end > 0, end_of_incoming, 0.0)
    # One program's block: the last positions' channels, or the last channel's positions.
    if shape == CHANNELS_LAST:
        assert torch.equal(end_of(result)[-16:].float(), expected[-16:])
    else:
        assert torch.equal(end_of(result)[:, -1].float(), expected[:, -1])
