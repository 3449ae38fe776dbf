"""The least bytes and operations of each op against counts by hand, on tensors small enough for that."""

import pytest
import torch

from fastnst_kernels.inspection import cost

SHAPE = (2, 3, 4, 5)  # 120 elements, 6 pairs of sample and channel
BF16, FP32 = torch.bfloat16, torch.float32


def test_instance_norm_forward_cost() -> None:
    plain = cost.instance_norm(SHAPE, BF16)
    # x and y of 120·2 bytes; weight and bias, 3·4 each; mean and 1/deviation, 6·4 each.
    assert plain.minimum_bytes == 240 + 240 + 2 * 12 + 2 * 24
    # Mean 1, variance 3, multiply and add 2; per pair: two divisions by 20, + ε, root, division, w·r, and b − μ·(w·r).
    assert plain.flops == 120 * 6 + 6 * 8
    with_all = cost.instance_norm(SHAPE, BF16, residual=True, relu=True)
    assert with_all.minimum_bytes == plain.minimum_bytes + 240
    assert with_all.flops == plain.flops + 120 * 2


def test_instance_norm_cost_with_upsampling_and_padding() -> None:
    # Upsampled by 2 and padded by 1: 10 × 12 positions of each of the 6 planes are written.
    padded = cost.instance_norm(SHAPE, BF16, relu=True, upsample=2, padding=1)
    plain = cost.instance_norm(SHAPE, BF16, relu=True)
    assert cost.padded_elements(SHAPE, 2, 1) == 720
    assert padded.minimum_bytes - plain.minimum_bytes == (720 - 120) * 2
    assert padded.flops == plain.flops


def test_instance_norm_backward_cost() -> None:
    plain = cost.instance_norm_backward(SHAPE, BF16)
    # dy, x and dx; mean and 1/deviation; weight in, its gradient and the bias's out.
    assert plain.minimum_bytes == 3 * 240 + 2 * 24 + 3 * 12
    # x̂ 2, Σg 1, Σg·x̂ 2, dx 4; per pair w·r and two divisions by 20.
    assert plain.flops == 120 * 9 + 6 * 3
    relu = cost.instance_norm_backward(SHAPE, BF16, relu=True)
    assert relu.minimum_bytes == plain.minimum_bytes + 12  # the bias, for the sign
    assert relu.flops == plain.flops + 120 * 3
    residual = cost.instance_norm_backward(SHAPE, BF16, residual=True)
    assert residual == plain  # its gradient is dy itself
    both = cost.instance_norm_backward(SHAPE, BF16, residual=True, relu=True)
    assert both.minimum_bytes == plain.minimum_bytes + 2 * 240  # what tells the sign in, d_residual out
    padded = cost.instance_norm_backward(SHAPE, BF16, residual=True, padding=1)
    assert padded.minimum_bytes == plain.minimum_bytes + (6 * 6 * 7 - 120) * 2 + 240
    assert padded.flops == plain.flops + 6 * 6 * 7 - 120
    upsampled = cost.instance_norm_backward(SHAPE, BF16, upsample=2)
    assert upsampled.minimum_bytes == plain.minimum_bytes + 3 * 240
    assert upsampled.flops == plain.flops + 3 * 120


def test_batch_norm_cost() -> None:
    training = cost.batch_norm(SHAPE, FP32, training=True)
    # x and y; weight and bias; both running statistics in and out; mean and 1/deviation out: vectors of 3·4 bytes.
    assert training.minimum_bytes == 2 * 480 + (2 + 4 + 2) * 12
    assert training.flops == 120 * 6 + 3 * 8
    inference = cost.batch_norm(SHAPE, FP32, training=False)
    assert inference.minimum_bytes == 2 * 480 + (2 + 2) * 12
    assert inference.flops == 120 * 2 + 3 * 6
    backward = cost.batch_norm_backward(SHAPE, FP32, training=True)
    assert backward.minimum_bytes == 3 * 480 + (2 + 3) * 12
    assert backward.flops == 120 * 9 + 3 * 3
    constant = cost.batch_norm_backward(SHAPE, FP32, training=False)
    assert constant.minimum_bytes == backward.minimum_bytes  # the weight's gradient needs x all the same
    assert constant.flops == 120 * 6 + 3


def test_gram_matrix_cost() -> None:
    # Two samples' G is 3 × 3 in fp32, each element a sum of 20 products, once scaled.
    assert cost.gram_matrix(SHAPE, BF16) == cost.Cost(2 * 9 * (2 * 20 + 1), 240 + 2 * 9 * 4)
    # Each of 120 gradients is a sum of 3 products; dG + dGᵀ and its scaling come before.
    assert cost.gram_matrix_backward(SHAPE, BF16) == cost.Cost(120 * 2 * 3 + 2 * 9 * 2, 2 * 240 + 2 * 9 * 4)
    assert cost.gram_matrix(SHAPE, torch.float64).minimum_bytes == 120 * 8 + 2 * 9 * 8


def test_style_loss_cost() -> None:
    forward = cost.style_loss(SHAPE, BF16)
    # Features and one target in; D + Dᵀ in bf16, and per sample its scale and the loss, out.
    assert forward.minimum_bytes == 240 + 9 * 4 + 2 * 9 * 2 + 2 * 2 * 4
    assert forward.flops == 2 * 9 * (2 * 20 + 5)
    assert cost.style_loss(SHAPE, BF16, shared_target=False).minimum_bytes == forward.minimum_bytes + 9 * 4
    backward = cost.style_loss_backward(SHAPE, BF16)
    assert backward.minimum_bytes == 2 * 240 + 2 * 9 * 2 + 2 * 2 * 4
    assert backward.flops == 120 * 2 * 3 + 2 * 9


def test_loss_relu_backward_cost() -> None:
    incoming = cost.loss_relu_backward(SHAPE, BF16)
    assert incoming == cost.Cost(120, 3 * 240)
    content = cost.loss_relu_backward(SHAPE, BF16, content=True)
    assert content == cost.Cost(120 * 4, 4 * 240 + 2 * 4)
    style = cost.loss_relu_backward(SHAPE, BF16, incoming=False, style=True)
    assert style == cost.Cost(120 + 120 * 2 * 3 + 2 * 9, 2 * 240 + 2 * 9 * 2 + 2 * 2 * 4)
    every = cost.loss_relu_backward(SHAPE, BF16, style=True, content=True)
    assert every.minimum_bytes == style.minimum_bytes + 2 * 240 + 2 * 4


def test_pooling_cost() -> None:
    # 2 × 2 windows over 4 × 5: 12 windows of 4, the last column uncovered.
    assert cost.max_pool2d_switches(SHAPE, BF16) == cost.Cost(24 * 3, 96 * 2 + 24 * 2 + 24)
    assert cost.max_unpool2d_switches(SHAPE, BF16) == cost.Cost(0, 120 * 2 + 24 * 2 + 24)
    assert cost.max_unpool2d_switches_backward(SHAPE, BF16) == cost.Cost(0, 96 * 2 + 24 * 2 + 24)
    # Windows of 3 that step by 1 overlap: 2 × 3 of them cover all.
    overlapping = cost.max_pool2d_switches(SHAPE, BF16, 3, 1)
    assert overlapping == cost.Cost(36 * 8, 120 * 2 + 36 * 2 + 36)
    assert cost.max_unpool2d_switches(SHAPE, BF16, 3, 1).flops == 36
    # Windows of 1 that step by 2 skip: 2 × 3 elements of each plane are read.
    assert cost.max_pool2d_switches(SHAPE, BF16, 1, 2).minimum_bytes == 36 * 2 + 36 * 2 + 36


def test_image_cost() -> None:
    # 120 bytes in; padded by 2, 8 × 9 positions of each of the 6 planes out; scale and shift, 3·4 bytes each.
    assert cost.uint8_to_input(SHAPE, BF16) == cost.Cost(240, 120 + 240 + 24)
    assert cost.uint8_to_input(SHAPE, BF16, 2) == cost.Cost(240, 120 + 6 * 72 * 2 + 24)
    # 6 planes have 3·5 pairs along the height and 4·4 along the width.
    assert cost.output_to_vgg_input(SHAPE, BF16) == cost.Cost(120 * 5 + 6 * 31 * 3, 480 + 24 + 2 * 3 * 4)
    assert cost.output_to_vgg_input_backward(SHAPE, BF16) == cost.Cost(120 * 6 + 6 * 31 * 4, 720 + 12)


def test_cost_adds() -> None:
    assert cost.Cost(1, 2) + cost.Cost(10, 20) == cost.Cost(11, 22)


@pytest.mark.parametrize("dtype", [torch.float16, BF16, FP32])
def test_cost_of_large_shapes_is_that_of_their_tensors(dtype: torch.dtype) -> None:
    """Two tensors forward, three backward, within a thousandth."""
    shape = (16, 32, 256, 256)
    unit = 16 * 32 * 256 * 256 * dtype.itemsize
    for counted, tensors in (
        (cost.instance_norm(shape, dtype, relu=True), 2),
        (cost.instance_norm_backward(shape, dtype, relu=True), 3),
        (cost.batch_norm(shape, dtype, training=True), 2),
    ):
        assert tensors <= counted.minimum_bytes / unit < tensors + 1e-3
