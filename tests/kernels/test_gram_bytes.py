"""What the kernels of Gram matrices, style losses and taps move, counted."""

import pytest
import torch

from fastnst_kernels import StyleMatrix, gram_matrix, style_loss_and_matrix, tap_backward
from helpers.byte_counter import count_bytes
from helpers.kernel_cases import LAYOUTS, randn


def interpreted(test):
    """Runs `test` in the interpreter's tier alone."""
    test = pytest.mark.usefixtures("tier")(test)
    return pytest.mark.parametrize("tier", ["interpreter"], indirect=True)(test)


both_formats = pytest.mark.parametrize("layout", ["channels_last", "contiguous"])


@interpreted
@both_formats
def test_gram_of_one_tile_reads_the_features_once(layout):
    """Besides them, C ≤ 64 moves one partial sum per split and the result, without what lies below the diagonal."""
    features = LAYOUTS[layout](randn((2, 64, 32, 32), torch.bfloat16))
    splits = 8  # of 128 positions
    with count_bytes() as traffic:
        gram_matrix(features)
    upper = 3 / 4  # of the 2 × 2 tiles of a Gram matrix the merge wants three
    partial = 2 * 64 * 64 * 4 * upper
    assert traffic.launches == 2
    assert traffic.loaded == features.nbytes + splits * partial
    assert traffic.stored == splits * partial + 2 * 64 * 64 * 4


@interpreted
@both_formats
def test_small_style_loss_leaves_no_partial_sums(layout):
    """What fits into one split is one launch: features, target, loss and the backward's operand, and no more."""
    features = LAYOUTS[layout](randn((3, 64, 8, 8), torch.bfloat16))
    target = torch.eye(64)
    with count_bytes() as traffic:
        _, matrix = style_loss_and_matrix(features, target)
    assert traffic.launches == 1
    assert traffic.unique_loaded == features.nbytes + target.nbytes
    assert traffic.unique_stored == traffic.stored == matrix.values.nbytes + 2 * 3 * 4  # each element once


@interpreted
@both_formats
def test_two_tiles_of_channels_cost_three_quarters(layout):
    """Of 2 × 2 tiles the lower left one is not computed, and the two on the diagonal load their features once."""
    features = LAYOUTS[layout](randn((1, 128, 8, 16), torch.bfloat16))
    with count_bytes() as traffic:
        gram_matrix(features)
    assert traffic.launches == 1
    assert traffic.loaded == 2 * features.nbytes
    assert traffic.stored == 128 * 128 * 4


@interpreted
@both_formats
@pytest.mark.parametrize("terms", [("incoming",), ("incoming", "content"), ("content",)], ids="+".join)
def test_tap_moves_each_operand_once(layout, terms):
    features, incoming, content = (LAYOUTS[layout](randn((2, 24, 9, 11), torch.bfloat16, seed=s)) for s in range(3))
    arguments = {}
    if "incoming" in terms:
        arguments["incoming"] = incoming
    if "content" in terms:
        arguments |= {"content_target": content, "content_factor": torch.ones(2)}
    with count_bytes() as traffic:
        tap_backward(features, **arguments)
    elements = (2 + len(terms)) * features.nbytes
    assert traffic.launches == 1
    assert elements <= traffic.total <= 1.01 * elements


@interpreted
@both_formats
@pytest.mark.parametrize("channels", [64, 136])
def test_tap_with_a_style_keeps_its_product_to_itself(layout, channels):
    """One launch; from memory come F, the incoming gradient and the matrix, to it goes the result, each once."""
    features, incoming = (LAYOUTS[layout](randn((2, channels, 8, 18), torch.bfloat16, seed=s)) for s in range(2))
    matrix = StyleMatrix(torch.zeros(2, channels, channels, dtype=torch.bfloat16), torch.ones(2))
    with count_bytes() as traffic:
        tap_backward(features, incoming=incoming, style_matrix=matrix, style_factor=torch.ones(2))
    assert traffic.launches == 1
    assert traffic.stored == features.nbytes
    assert traffic.unique_loaded == features.nbytes + incoming.nbytes + matrix.values.nbytes + 2 * 2 * 4
