"""Bytes that the kernels of Gram matrices, style losses and their gradients move, counted."""

import pytest
import torch

from fastnst_kernels import StyleMatrix, gram_matrix, loss_relu_backward, style_loss_and_matrix
from helpers.byte_counter import count_bytes
from helpers.kernel_cases import LAYOUTS, in_interpreter, randn

both_formats = pytest.mark.parametrize("layout", ["channels_last", "contiguous"])


@in_interpreter
@both_formats
def test_gram_matrix_of_one_tile_reads_the_features_once(layout):
    """Besides, C ≤ 64 moves one partial sum per split and the result, without the lower triangle."""
    features = LAYOUTS[layout](randn((2, 64, 32, 32), torch.bfloat16))
    splits = 8  # of 128 positions
    with count_bytes() as traffic:
        gram_matrix(features)
    upper = 3 / 4  # of the 2 × 2 tiles of a Gram matrix the merge wants three
    partial = 2 * 64 * 64 * 4 * upper
    assert traffic.launches == 2
    assert traffic.loaded == features.nbytes + splits * partial
    assert traffic.stored == splits * partial + 2 * 64 * 64 * 4


@in_interpreter
@both_formats
def test_style_loss_in_one_split_writes_no_partial_sums(layout):
    """One launch: features, target, loss and the backward's operand, and no more."""
    features = LAYOUTS[layout](randn((3, 64, 8, 8), torch.bfloat16))
    target = torch.eye(64)
    with count_bytes() as traffic:
        _, matrix = style_loss_and_matrix(features, target)
    assert traffic.launches == 1
    assert traffic.unique_loaded == features.nbytes + target.nbytes
    assert traffic.unique_stored == traffic.stored == matrix.values.nbytes + 2 * 3 * 4  # each element once


@in_interpreter
@both_formats
def test_gram_matrix_of_two_tiles_computes_three_quarters(layout):
    """Of 2 × 2 tiles the lower left one is not computed; those on the diagonal load their features once."""
    features = LAYOUTS[layout](randn((1, 128, 8, 16), torch.bfloat16))
    with count_bytes() as traffic:
        gram_matrix(features)
    assert traffic.launches == 1
    assert traffic.loaded == 2 * features.nbytes
    assert traffic.stored == 128 * 128 * 4


@in_interpreter
@both_formats
@pytest.mark.parametrize("terms", [("incoming",), ("incoming", "content"), ("content",)], ids="+".join)
def test_loss_relu_backward_moves_each_operand_once(layout, terms):
    features, incoming, content = (LAYOUTS[layout](randn((2, 24, 9, 11), torch.bfloat16, seed=s)) for s in range(3))
    arguments = {}
    if "incoming" in terms:
        arguments["incoming"] = incoming
    if "content" in terms:
        arguments |= {"content_target": content, "content_factor": torch.ones(2)}
    with count_bytes() as traffic:
        loss_relu_backward(features, **arguments)
    elements = (2 + len(terms)) * features.nbytes
    assert traffic.launches == 1
    assert elements <= traffic.total <= 1.01 * elements


@in_interpreter
@both_formats
@pytest.mark.parametrize("channels", [64, 136])
def test_loss_relu_backward_with_a_style_is_one_launch(layout, channels):
    """One launch; F, the incoming gradient and the matrix are read, the result written, each once."""
    features, incoming = (LAYOUTS[layout](randn((2, channels, 8, 18), torch.bfloat16, seed=s)) for s in range(2))
    matrix = StyleMatrix(torch.zeros(2, channels, channels, dtype=torch.bfloat16), torch.ones(2))
    with count_bytes() as traffic:
        loss_relu_backward(features, incoming=incoming, style_matrix=matrix, style_factor=torch.ones(2))
    assert traffic.launches == 1
    assert traffic.stored == features.nbytes
    assert traffic.unique_loaded == features.nbytes + incoming.nbytes + matrix.values.nbytes + 2 * 2 * 4
