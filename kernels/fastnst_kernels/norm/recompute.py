"""Norms that do not keep their result for the backward of the next convolution, but recompute it.

Source: Chen, Xu, Zhang, Guestrin 2016, "Training Deep Nets with Sublinear Memory Cost", on one pair of layers.

A norm saves its input x, a convolution its input y = upsample_pad(relu?(norm(x) + residual)): the weight's gradient
needs y, and on the CPU the ReLU's mask does, too. But y follows from x, μ and 1/√(σ² + ε), and the latter are small:

    forward     y, μ, r = norm(x)                  z = conv(y)       saved: x, μ, r, the weights
    backward    y = upsample_pad(relu?((x − μ)·r·w + b + residual))  the same operations on the same numbers
                dy, d_weight = conv's backward(dz, y)
                dx, dw, db, d_residual = norm's backward(dy, x, μ, r), then y is freed

If the residual is such a y itself, it is not saved either: the first backward that needs it recomputes the ones below
it, down to one without a residual, and each stays until its own norm's backward. So a chain of residual blocks is
recomputed once.

Bytes: per norm x is read and y written once more, and a residual read; memory holds y less from the forward on. The
results are the same bits wherever the norm runs in two steps, statistics and then this map; in one pass on a GPU they
may differ in rounding.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastnst_kernels import runtime
from fastnst_kernels.norm import op
from fastnst_kernels.norm.batch_norm import batch_norm, check_batch_inputs, update_running
from fastnst_kernels.norm.instance_norm import instance_norm
from fastnst_kernels.norm.op import NormOptions


def recomputed_instance_norm(x: Tensor, weight: Tensor, bias: Tensor, **options: Unpack[NormOptions]) -> Tensor:
    """`instance_norm`, with the same arguments, for a result that `conv.convolution` does not save.

    Any other op that takes the result saves it as usual. Without gradients, and under torch.compile, which chooses
    itself what to recompute, it is `instance_norm`.

    Raises:
        ValueError: as `instance_norm`.
    """
    if is_plain():
        return instance_norm(x, weight, bias, **options)
    op.check_inputs(x, options.get("residual"), options.get("eps", 1e-5), weight=weight, bias=bias)
    return _recomputed(x, weight, bias, None, 0.0, options)


def recomputed_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    momentum: float = 0.1,
    **options: Unpack[NormOptions],
) -> Tensor:
    """`batch_norm` in training, with the same arguments, as `recomputed_instance_norm`.

    The running statistics are updated once, in the forward.

    Raises:
        ValueError: as `batch_norm`.
    """
    running = (running_mean, running_var)
    if is_plain():
        return batch_norm(x, weight, bias, *running, training=True, momentum=momentum, **options)
    check_batch_inputs(
        x, weight, bias, *running, options.get("residual"), options.get("eps", 1e-5), momentum, training=True
    )
    return _recomputed(x, weight, bias, running, momentum, options)


def is_plain() -> bool:
    """Whether nothing is recomputed: without gradients and under torch.compile."""
    return torch.compiler.is_compiling() or not torch.is_grad_enabled()


def node_of(y: Tensor | None) -> Any:
    """The graph node that recomputes `y`; None unless y is an unmodified result of a norm of this module."""
    node: Any = None if y is None else y.grad_fn
    if y is None or getattr(node, "_forward_cls", None) is not _Norm:
        return None
    return node if node.version == y._version else None


def recomputed_output(node: Any) -> Tensor:
    """The result of the norm with this graph node, recomputed unless it is there."""
    if node.value is None:
        x, weight, bias, mean, rstd, residual = node.saved_tensors
        if node.residual_node is not None:
            residual = recomputed_output(node.residual_node)
        # The statistics are given, so ε does not enter.
        node.value = torch.ops.fastnst.norm(
            x, weight, bias, [mean, rstd], residual, mean.dim() == 2, 0.0, node.relu, node.pad
        )[0]
    value: Tensor = node.value
    return value


def _recomputed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor] | None,
    momentum: float,
    options: NormOptions,
) -> Tensor:
    residual = options.get("residual")
    arguments = (options.get("eps", 1e-5), options.get("relu", False), op.pad_of(x, options).as_ints())
    y: Tensor = _Norm.apply(x, weight, bias, residual, node_of(residual), running, momentum, *arguments)  # type: ignore[no-untyped-call]
    node: Any = y.grad_fn
    if node is not None:
        node.version = y._version
    return y


class _Norm(torch.autograd.Function):
    """A norm that does not keep its result. Its graph node recomputes it: `recomputed_output`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        residual_node: Any,
        running: tuple[Tensor, Tensor] | None,
        momentum: float,
        eps: float,
        relu: bool,
        pad: list[int],
    ) -> Tensor:
        y: Tensor
        y, mean, rstd, var = torch.ops.fastnst.norm(x, weight, bias, [], residual, running is None, eps, relu, pad)
        if running is not None:
            update_running(*running, mean, var, x, momentum)
        op.save_options(ctx, x, residual, relu, pad)
        ctx.residual_node, ctx.value = residual_node, None
        ctx.save_for_backward(x, weight, bias, mean, rstd, residual if residual_node is None else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *saved, residual = ctx.saved_tensors
        y = None
        if ctx.relu and runtime.implementation(saved[0]) == "reference":
            y = recomputed_output(ctx)
        elif ctx.relu and ctx.residual_node is not None:
            residual = recomputed_output(ctx.residual_node)
        ctx.value = None
        saved = (*saved, residual if ctx.relu else None, y)
        computed = op.gradients(ctx, dy, saved, fixed=False, needs_residual=ctx.needs_input_grad[3])
        return *computed, None, None, None, None, None, None
