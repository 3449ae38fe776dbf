"""The loss network's layers: Gram matrices, style losses, pooling, gradients at layers with losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnst_kernels as fk
from fastnst_kernels.inspection import cost
from fastnst_kernels.inspection.cost import Cost
from kernel_bench.ops import BACKWARD, FORWARD, Draw, Inputs, Op, Shape, Size, image_gradient

LAYER_SIZES: tuple[Size, ...] = ((64, 256, 256), (128, 128, 128), (256, 64, 64), (512, 32, 32), (512, 16, 16))
SMALL_LAYER_SIZES: tuple[Size, ...] = ((16, 32, 32), (32, 16, 16))


def _features(draw: Draw, shape: Shape) -> Inputs:
    return Inputs({"features": draw.images(shape).relu_()})


def _features_and_target(draw: Draw, shape: Shape) -> Inputs:
    _, c, h, w = shape
    style = draw.vector((c, h * w), deviation=1.5).relu_()
    return Inputs(_features(draw, shape).leaves, {"target": style @ style.mT / (c * h * w)})


def _eager_gram(features: Tensor) -> Tensor:
    """The product in the features' dtype, as cuBLAS does it; the rest in fp32.

    `torch.bmm` can also write its sums in fp32 (`out_dtype`), but autograd has no derivative for that.
    """
    f = features.flatten(2)  # a view in both memory formats
    gram = torch.bmm(f, f.mT)
    return gram.to(torch.promote_types(gram.dtype, torch.float32)) / (f.shape[1] * f.shape[2])


def _eager_style_loss(features: Tensor, target: Tensor) -> Tensor:
    return (_eager_gram(features) - target).square().sum((1, 2))


def _gram_gradient(draw: Draw, y: Tensor, shape: Shape) -> Tensor:
    """Large, as with loss scaling: otherwise the features' gradient underflows in fp16."""
    return draw.vector(tuple(y.shape), deviation=shape[2] * shape[3] / 32)


def _loss_gradient(draw: Draw, y: Tensor, shape: Shape) -> Tensor:
    return draw.vector(tuple(y.shape), mean=1.0, deviation=0.1) * (shape[1] * shape[2] * shape[3] / 8)


def _gram_op(
    name: str,
    inputs: Callable[[Draw, Shape], Inputs],
    calls: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    least: tuple[Callable[..., Cost], Callable[..., Cost]],
    upstream: Callable[[Draw, Tensor, Shape], Tensor],
) -> Op:
    def costs(shape: Shape, dtype: torch.dtype) -> dict[str, Cost]:
        return {FORWARD: least[0](shape, dtype), BACKWARD: least[1](shape, dtype)}

    return Op(name, LAYER_SIZES, SMALL_LAYER_SIZES, inputs, *calls, costs, upstream, has_matrix_product=True)


# Pooling.


def _pool_inputs(draw: Draw, shape: Shape) -> Inputs:
    return Inputs({"x": draw.images(shape)})


def _eager_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, 2, return_indices=True)[0]


def _fastnst_pool(x: Tensor) -> Tensor:
    return fk.max_pool2d_switches(x)[0]


def _unpool_inputs(draw: Draw, shape: Shape) -> Inputs:
    """`shape` is that of the output; switches and PyTorch's indices are equivalent."""
    pooled = draw.images(shape)
    _, indices = F.max_pool2d(pooled, 2, 2, return_indices=True)
    switches = fk.max_pool2d_switches_reference(pooled)[1].contiguous(memory_format=draw.memory_format)
    n, c, h, w = shape
    y = draw.images((n, c, h // 2, w // 2))
    return Inputs({"y": y}, {"switches": switches, "indices": indices})


def _eager_unpool(y: Tensor, _switches: Tensor, indices: Tensor) -> Tensor:
    return F.max_unpool2d(y, indices, [2, 2], [2, 2])


def _fastnst_unpool(y: Tensor, switches: Tensor, _indices: Tensor) -> Tensor:
    return fk.max_unpool2d_switches(y, switches, (2 * y.shape[2], 2 * y.shape[3]))


def _pool_costs(shape: Shape, dtype: torch.dtype) -> dict[str, Cost]:
    return {FORWARD: cost.max_pool2d_switches(shape, dtype), BACKWARD: cost.max_unpool2d_switches(shape, dtype)}


def _unpool_costs(shape: Shape, dtype: torch.dtype) -> dict[str, Cost]:
    backward = cost.max_unpool2d_switches_backward(shape, dtype)
    return {FORWARD: cost.max_unpool2d_switches(shape, dtype), BACKWARD: backward}


# Gradients at layers with losses: incoming, style and content, through the ReLU.


def _loss_relu_inputs(draw: Draw, shape: Shape, *, style: bool) -> Inputs:
    n, c, h, w = shape
    fixed = {"features": draw.images(shape).relu_(), "incoming": draw.images(shape)}
    if not style:
        content = draw.images(shape).relu_()
        return Inputs({}, fixed | {"content_target": content, "content_factor": draw.vector((n,), mean=1.0)})
    target = draw.vector((c, c), mean=0.5 / c, deviation=0.5 / c)
    matrix = fk.style_loss_and_matrix(fixed["features"], target)[1]
    # The style term becomes about as large as the incoming gradient.
    factor = draw.vector((n,), mean=1.0, deviation=0.1) * (c * h * w)
    return Inputs({}, fixed | {"values": matrix.values, "scale": matrix.scale, "style_factor": factor})


def _eager_loss_relu_style(features: Tensor, incoming: Tensor, values: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
    """The C × C matrix is scaled; the product's own epilogue adds the incoming gradient."""
    _, c, h, w = features.shape
    matrix = (values * (scale * factor / (c * h * w)).view(-1, 1, 1)).to(features.dtype)
    total = torch.baddbmm(incoming.flatten(2).mT, features.flatten(2).mT, matrix).mT.unflatten(2, (h, w))
    return torch.ops.aten.threshold_backward(total, features, 0)


def _eager_loss_relu_content(features: Tensor, incoming: Tensor, target: Tensor, factor: Tensor) -> Tensor:
    total = incoming + factor.to(features.dtype).view(-1, 1, 1, 1) * (features - target)
    return torch.ops.aten.threshold_backward(total, features, 0)


def _fastnst_loss_relu_style(
    features: Tensor, incoming: Tensor, values: Tensor, scale: Tensor, factor: Tensor
) -> Tensor:
    matrix = fk.StyleMatrix(values, scale)
    return fk.loss_relu_backward(features, incoming=incoming, style_matrix=matrix, style_factor=factor)


def _fastnst_loss_relu_content(features: Tensor, incoming: Tensor, target: Tensor, factor: Tensor) -> Tensor:
    return fk.loss_relu_backward(features, incoming=incoming, content_target=target, content_factor=factor)


def _loss_relu(*, style: bool) -> Op:
    def costs(shape: Shape, dtype: torch.dtype) -> dict[str, Cost]:
        return {FORWARD: cost.loss_relu_backward(shape, dtype, style=style, content=not style)}

    return Op(
        "loss_relu_backward+style" if style else "loss_relu_backward+content",
        LAYER_SIZES,
        SMALL_LAYER_SIZES,
        partial(_loss_relu_inputs, style=style),
        _fastnst_loss_relu_style if style else _fastnst_loss_relu_content,
        _eager_loss_relu_style if style else _eager_loss_relu_content,
        costs,
        image_gradient,
        has_matrix_product=style,
    )


GRAM_MATRIX = _gram_op(
    "gram_matrix",
    _features,
    (fk.gram_matrix, _eager_gram),
    (cost.gram_matrix, cost.gram_matrix_backward),
    _gram_gradient,
)
STYLE_LOSS = _gram_op(
    "style_loss",
    _features_and_target,
    (fk.style_loss, _eager_style_loss),
    (cost.style_loss, cost.style_loss_backward),
    _loss_gradient,
)
MAX_POOL = Op(
    "max_pool2d_switches",
    LAYER_SIZES,
    SMALL_LAYER_SIZES,
    _pool_inputs,
    _fastnst_pool,
    _eager_pool,
    _pool_costs,
    image_gradient,
)
MAX_UNPOOL = Op(
    "max_unpool2d_switches",
    LAYER_SIZES,
    SMALL_LAYER_SIZES,
    _unpool_inputs,
    _fastnst_unpool,
    _eager_unpool,
    _unpool_costs,
    image_gradient,
)
LOSS_RELU_STYLE = _loss_relu(style=True)
LOSS_RELU_CONTENT = _loss_relu(style=False)
