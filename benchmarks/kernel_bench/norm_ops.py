"""Instance and batch norm with their epilogues: ReLU, residual, upsampling, padding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnst_kernels as fk
from fastnst_kernels.inspection import cost
from fastnst_kernels.inspection.cost import Cost
from kernel_bench.ops import BACKWARD, FORWARD, Draw, Inputs, Op, Shape, Size, image_gradient

NORM_SIZES: tuple[Size, ...] = ((32, 256, 256), (64, 128, 128), (128, 64, 64))
SMALL_NORM_SIZES: tuple[Size, ...] = ((8, 32, 32), (16, 16, 16))

EPILOGUES: dict[str, dict[str, Any]] = {
    "": {},
    "+relu": {"relu": True},
    "+residual": {"residual": True},
    "+relu+pad": {"relu": True, "padding": 1},
    "+relu+up2+pad": {"relu": True, "upsample": 2, "padding": 1},
}


def _norm_inputs(draw: Draw, shape: Shape, *, residual: bool, running: bool) -> Inputs:
    channels = (shape[1],)
    leaves = {
        "x": draw.images(shape, mean=1.0, deviation=2.0),
        "weight": draw.vector(channels, mean=1.0, deviation=0.2),
        "bias": draw.vector(channels, deviation=0.2),
    }
    if residual:
        leaves["residual"] = draw.images(shape)
    statistics = {"running_mean": draw.vector(channels, mean=1.0, deviation=0.1)}
    statistics["running_var"] = draw.vector(channels, mean=4.0, deviation=0.1)
    return Inputs(leaves, statistics if running else {})


def _epilogue(y: Tensor, relu: bool, upsample: int, padding: int) -> Tensor:
    y = F.relu(y) if relu else y
    y = F.interpolate(y, scale_factor=upsample, mode="nearest") if upsample > 1 else y
    return F.pad(y, (padding,) * 4, mode="reflect") if padding else y


def _eager_instance_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    relu: bool = False,
    upsample: int = 1,
    padding: int = 0,
) -> Tensor:
    y = F.instance_norm(x, weight=weight, bias=bias)
    return _epilogue(y if residual is None else y + residual, relu, upsample, padding)


def _eager_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *others: Tensor,
    training: bool,
    relu: bool = False,
    upsample: int = 1,
    padding: int = 0,
) -> Tensor:
    *residual, running_mean, running_var = others
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training=training, momentum=0.1)
    return _epilogue(y + residual[0] if residual else y, relu, upsample, padding)


def _fastnst_instance_norm(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor, **options: Any) -> Tensor:
    return fk.instance_norm(x, weight, bias, residual=residual[0] if residual else None, **options)


def _fastnst_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, *others: Tensor, **options: Any) -> Tensor:
    *residual, mean, variance = others
    return fk.batch_norm(x, weight, bias, mean, variance, residual=residual[0] if residual else None, **options)


def _near_the_kink(inputs: Inputs, epsilon: float, *, eager: Callable[..., Tensor]) -> Tensor:
    fixed = [tensor.clone() for tensor in inputs.fixed.values()]
    z = eager(*inputs.leaves.values(), *fixed)
    parts = [inputs.leaves["bias"].view(1, -1, 1, 1)]
    parts += [inputs.leaves["residual"]] if "residual" in inputs.leaves else []
    magnitude = (z - sum(parts)).abs()
    for part in parts:
        magnitude = magnitude + part.abs()
    return z.abs() <= epsilon * magnitude


def norm(name: str, epilogue: str, training: bool | None = None) -> Op:
    """Instance norm without `training`, else batch norm."""
    options = dict(EPILOGUES[epilogue])
    residual = options.pop("residual", False)
    mode: dict[str, Any] = {} if training is None else {"training": training}
    eager: Callable[..., Tensor] = _eager_instance_norm if training is None else _eager_batch_norm
    fastnst: Callable[..., Tensor] = _fastnst_instance_norm if training is None else _fastnst_batch_norm
    least: list[Callable[..., Cost]] = [cost.instance_norm, cost.instance_norm_backward]
    if training is not None:
        least = [cost.batch_norm, cost.batch_norm_backward]

    def costs(shape: Shape, dtype: torch.dtype) -> dict[str, Cost]:
        forward, backward = (each(shape, dtype, residual=residual, **mode, **options) for each in least)
        return {FORWARD: forward, BACKWARD: backward}

    return Op(
        name + epilogue,
        NORM_SIZES,
        SMALL_NORM_SIZES,
        partial(_norm_inputs, residual=residual, running=training is not None),
        partial(fastnst, **mode, **options),
        partial(eager, **mode, **options),
        costs,
        image_gradient,
        partial(_near_the_kink, eager=partial(eager, **mode)) if options.get("relu") else None,
    )
