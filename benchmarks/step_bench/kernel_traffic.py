"""Bytes that the kernels of an op move, from their launches, recorded without a GPU.

Where launches cannot be recorded (no Triton, or its interpreter), `fastnst_kernels.inspection.cost` gives the minimum
of the op.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

import torch
from torch import Tensor

import fastnst_kernels as fk
from fastnst_kernels import runtime
from fastnst_kernels.inspection import cost
from fastnst_kernels.inspection.recording import record

ARCHITECTURE = "sm_90"

Shape = tuple[int, int, int, int]


def can_record() -> bool:
    return runtime.triton is not None and not runtime.INTERPRETING


@cache
def launched_bytes(op: str, shape: Shape, dtype: torch.dtype, *, backward: bool = False, **options: Any) -> int:
    """Bytes of all operands of all launches, if each launch reads or writes each of its tensors once.

    Args:
        op: a function of `fastnst_kernels`.
        shape: `[N, C, H, W]` of its image; of the result for an unpooling.
        dtype: of the images.
        backward: of the op's backward instead.
        options: those of `fastnst_kernels.inspection.cost`, and the layout of a norm's result; `residual_border`: pixels
            by which the residual is larger at each side.
    """
    if not can_record():
        return _least(op, shape, dtype, backward, options)
    with torch.enable_grad(), record(_modules(), ARCHITECTURE) as launches:
        x = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last, requires_grad=True)
        result, leaves = _CALLS[op](x, **options)
        forward = len(launches)
        if backward:
            torch.autograd.grad(result, leaves, torch.empty_like(result))
        return sum(launch.bytes for launch in (launches[forward:] if backward else launches))


def _modules() -> list[Any]:
    return [importlib.import_module(found.name) for found in pkgutil.walk_packages(fk.__path__, f"{fk.__name__}.")]


def _norm(x: Tensor, residual: bool = False, residual_border: int = 0, **options: Any) -> tuple[Tensor, list[Tensor]]:
    n, c, h, w = x.shape
    leaves = [x, *(torch.empty(c, requires_grad=True) for _ in range(2))]
    added = None
    if residual:
        shape = (n, c, h + 2 * residual_border, w + 2 * residual_border)
        added = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last, requires_grad=True)
    norm = fk.instance_norm
    if options.pop("batch"):
        running = torch.empty(c), torch.empty(c)

        def norm(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
            return fk.batch_norm(x, weight, bias, *running, training=True, **options)

    return norm(*leaves, residual=added, **options), leaves if added is None else [*leaves, added]


def _tap(x: Tensor, incoming: bool = True, style: bool = False, content: bool = False) -> tuple[Tensor, list[Tensor]]:
    n, c = x.shape[:2]
    vector = torch.empty(n)
    result = fk.loss_relu_backward(
        x.detach(),
        incoming=torch.empty_like(x) if incoming else None,
        style_matrix=fk.StyleMatrix(torch.empty(n, c, c, dtype=x.dtype), vector) if style else None,
        style_factor=vector if style else None,
        content_target=torch.empty_like(x) if content else None,
        content_factor=vector if content else None,
    )
    return result, []


def _unpool(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    n, c, h, w = x.shape
    pooled = (n, c, h // 2, w // 2)
    y = torch.empty(pooled, dtype=x.dtype, memory_format=torch.channels_last)
    switches = torch.empty(pooled, dtype=torch.uint8, memory_format=torch.channels_last).zero_()
    return fk.max_unpool2d_switches(y, switches, (h, w), 2, 2), []


def _input(x: Tensor, padding: int = 0) -> tuple[Tensor, list[Tensor]]:
    n, c, h, w = x.shape
    images = torch.empty((n, h, w, c), dtype=torch.uint8).permute(0, 3, 1, 2)
    return fk.uint8_to_input(images, 1 / 255, padding=padding, dtype=x.dtype), []


def _boundary(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    vector, ending = torch.empty(3), {"window": (0, 0, *x.shape[2:]), "tanh": True, "factor": 0.5}
    return fk.output_to_vgg_input(x.detach(), vector, vector, **ending, offset=0.5, dtype=x.dtype)[0], []


def _boundary_backward(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    ending = {"window": (0, 0, *x.shape[2:]), "tanh": True, "factor": 0.5, "variation": (1.0, 1.0)}
    return fk.output_to_vgg_input_backward(x.detach(), torch.empty_like(x), torch.empty(3), **ending), []


_CALLS: dict[str, Any] = {
    "instance_norm": lambda x, **options: _norm(x, batch=False, **options),
    "batch_norm": lambda x, **options: _norm(x, batch=True, **options),
    "style_loss": lambda x: (fk.style_loss(x.detach(), torch.empty(x.shape[1], x.shape[1])), []),
    "max_pool2d_switches": lambda x: (fk.max_pool2d_switches(x.detach())[0], []),
    "max_unpool2d_switches": _unpool,
    "loss_relu_backward": _tap,
    "uint8_to_input": _input,
    "output_to_vgg_input": _boundary,
    "output_to_vgg_input_backward": _boundary_backward,
}


def _least(op: str, shape: Shape, dtype: torch.dtype, backward: bool, options: dict[str, Any]) -> int:
    known = {name: value for name, value in options.items() if name not in ("padding_mode", "residual_border")}
    if isinstance(known.get("padding"), tuple):
        known["padding"] = max(known["padding"])  # the cost model has equal borders at all sides
    if op == "batch_norm":
        known["training"] = True
    counter = getattr(cost, op + ("_backward" if backward else ""))
    least: int = counter(shape, dtype, **known).minimum_bytes
    return least
