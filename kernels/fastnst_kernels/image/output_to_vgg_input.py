"""A transform net's raw output to VGG's input, with sums of total variation; and the gradient.

Legend: z `[N, 3, Hz, Wz]` the raw output of the transform net, s the stylized image in a window of z, u VGG's input;
act is tanh or the identity; all images are channels_last.

    s = factor·act(z[window]) + offset          u[:, c] = (s[:, c] − mean[c])·gain[c]
    V = Σ (s[h + 1] − s[h])²    Q = Σ (s[w + 1] − s[w])²    per image, the sums of total variation

Backward, with L = f(u) + a·ΣV + b·ΣQ, a and b the same for all images:

    ∂L/∂s = gain·∂L/∂u + 2a·((s[h] − s[h − 1]) − (s[h + 1] − s[h])) + 2b·(likewise along w), without missing neighbours
    ∂L/∂z = factor·act'·∂L/∂s in the window, 0 around it;    act' = 1 − tanh² or 1

s is never written: the backward recomputes it from z, which has half as many bytes in 16 bits as s in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.image import kernels


def output_to_vgg_input_reference(
    z: Tensor,
    mean: Tensor,
    gain: Tensor,
    *,
    window: Sequence[int],
    tanh: bool,
    factor: float,
    offset: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The formula in PyTorch, differentiable in z; same arguments as `output_to_vgg_input`."""
    s = factor * _activated(z, window, tanh) + offset
    u = (s - mean.to(s.dtype).view(3, 1, 1)) * gain.to(s.dtype).view(3, 1, 1)
    differences = s[:, :, 1:] - s[:, :, :-1], s[..., 1:] - s[..., :-1]
    sums = [difference.square().sum((1, 2, 3)) for difference in differences]
    return u.to(dtype), torch.stack([*sums, (s * 0.0).sum((1, 2, 3))], 1)


def output_to_vgg_input_backward_reference(
    z: Tensor,
    du: Tensor,
    gain: Tensor,
    *,
    window: Sequence[int],
    tanh: bool,
    factor: float,
    variation: Sequence[float] = (0.0, 0.0),
    d_variation: Tensor | None = None,
    watch: Tensor | None = None,
) -> Tensor:
    """The formula in PyTorch, in fp32 (fp64 for fp64); same arguments as `output_to_vgg_input_backward`."""
    activated = _activated(z, window, tanh)
    d_s = du.to(activated.dtype) * gain.to(activated.dtype).view(3, 1, 1)
    for dimension, weight in zip((2, 3), variation, strict=True):
        if weight:
            length = activated.shape[dimension] - 1
            first, second = (activated.narrow(dimension, begin, length) for begin in (0, 1))
            difference = (second - first).mul_(2.0 * weight * factor)
            difference = difference if d_variation is None else difference.mul_(d_variation)
            d_s.narrow(dimension, 1, length).add_(difference)
            d_s.narrow(dimension, 0, length).sub_(difference)
    slope = (1.0 - activated.square()).mul_(factor) if tanh else factor
    inner = d_s.mul_(slope)
    inner = inner if watch is None else inner.add_(watch)
    dz = torch.zeros_like(z)
    _inside(dz, window).copy_(inner)
    return dz


def _inside(x: Tensor, window: Sequence[int]) -> Tensor:
    top, left, height, width = window
    return x[:, :, top : top + height, left : left + width]


def _activated(z: Tensor, window: Sequence[int], tanh: bool) -> Tensor:
    """act(z[window]), at least fp32."""
    x = _inside(z, window).to(torch.promote_types(z.dtype, torch.float32))
    return x.tanh() if tanh else x


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _on_reference(*tensors: Tensor) -> bool:
    return any(runtime.implementation(tensor) == "reference" for tensor in tensors)


@torch.library.custom_op("fastnst::output_to_vgg_input", mutates_args=())
def _output_to_vgg_input(
    z: Tensor,
    mean: Tensor,
    gain: Tensor,
    window: Sequence[int],
    tanh: bool,
    factor: float,
    offset: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    z = _dense(z)
    u = kernels.allocate(z.shape[0], window[2], window[3], z, dtype)
    if _on_reference(z, u):
        made, sums = output_to_vgg_input_reference(
            z, mean, gain, window=window, tanh=tanh, factor=factor, offset=offset, dtype=dtype
        )
        return u.copy_(made), sums
    partial = kernels.output_to_vgg_input(z, mean.contiguous(), gain.contiguous(), u, window, tanh, factor, offset)
    return u, partial.sum(1)


@_output_to_vgg_input.register_fake
def _(z: Tensor, _mean: Tensor, _gain: Tensor, window: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor]:
    *_, dtype = rest
    sums = runtime.allocate((z.shape[0], 3), z, runtime.statistics_dtype(z))
    return kernels.allocate(z.shape[0], window[2], window[3], z, dtype), sums


@torch.library.custom_op("fastnst::output_to_vgg_input_backward", mutates_args=())
def _output_to_vgg_input_backward(
    z: Tensor,
    du: Tensor,
    gain: Tensor,
    window: Sequence[int],
    tanh: bool,
    factor: float,
    variation: Sequence[float],
    d_variation: Tensor | None,
    watch: Tensor | None,
) -> Tensor:
    z, du = _dense(z), _dense(du)
    dz = kernels.allocate(z.shape[0], z.shape[2], z.shape[3], z, z.dtype)
    if _on_reference(z, du):
        options = {"variation": variation, "d_variation": d_variation, "watch": watch}
        made = output_to_vgg_input_backward_reference(
            z,
            du,
            gain,
            window=window,
            tanh=tanh,
            factor=factor,
            **options,  # type: ignore[arg-type]
        )
        return dz.copy_(made)
    kernels.output_to_vgg_input_backward(
        z, du, gain.contiguous(), dz, window, tanh, factor, variation, d_variation, watch
    )
    return dz


@_output_to_vgg_input_backward.register_fake
def _(z: Tensor, *_: Any) -> Tensor:
    return kernels.allocate(z.shape[0], z.shape[2], z.shape[3], z, z.dtype)


@torch.no_grad()
def output_to_vgg_input(
    z: Tensor,
    mean: Tensor,
    gain: Tensor,
    *,
    window: Sequence[int],
    tanh: bool,
    factor: float,
    offset: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """VGG's input u for a transform net's raw output z, and the sums of total variation.

    For callers that chain gradients themselves: the backward is `output_to_vgg_input_backward`.

    Args:
        z: `[N, 3, Hz, Wz]`, float32, float16, bfloat16 (float64 on the reference path); channels_last is not copied.
        mean: `[3]`, floating.
        gain: `[3]`, floating.
        window: (top, left, height, width) of the stylized images s in z.
        tanh: whether s = factor·tanh(z) + offset; else s = factor·z + offset.
        factor, offset: of s.
        dtype: of u.

    Returns:
        u: `[N, 3, height, width]`, (s − mean)·gain, channels_last.
        sums: `[N, 3]` in float32 (float64 for float64): of the squared differences of neighbours along the height,
            along the width, and 0, or NaN if s is not finite.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the window leaves z.
    """
    _check(z, window)
    runtime.check_number("factor", factor)
    runtime.check_number("offset", offset)
    kernels.check_dtype(dtype)
    for name, vector in (("mean", mean), ("gain", gain)):
        runtime.check_per_channel(name, vector, z)
    u, sums = torch.ops.fastnst.output_to_vgg_input(z, mean, gain, list(window), tanh, factor, offset, dtype)
    return u, sums


@torch.no_grad()
def output_to_vgg_input_backward(
    z: Tensor,
    du: Tensor,
    gain: Tensor,
    *,
    window: Sequence[int],
    tanh: bool,
    factor: float,
    variation: Sequence[float] = (0.0, 0.0),
    d_variation: Tensor | None = None,
    watch: Tensor | None = None,
) -> Tensor:
    """∂L/∂z of L = f(u) + d_variation·(variation[0]·Σ sums[:, 0] + variation[1]·Σ sums[:, 1]).

    Args:
        z: as in `output_to_vgg_input`, likewise `gain`, `window`, `tanh` and `factor`.
        du: ∂f/∂u `[N, 3, height, width]`, any floating type.
        variation: weights of the sums along the height and along the width.
        d_variation: 0-d, floating; None: 1.
        watch: 0-d, floating: added to all values in the window, for example NaN if the loss is NaN; None: 0.

    Returns:
        `[N, 3, Hz, Wz]` in z's dtype, channels_last; 0 outside the window.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the window leaves z.
    """
    _check(z, window)
    runtime.check_images("du", du)
    if tuple(du.shape) != (z.shape[0], 3, *window[2:]):
        raise ValueError(f"du has shape {tuple(du.shape)}, expected {(z.shape[0], 3, *window[2:])}: the window's")
    runtime.check_same_device("du", du, "z", z)
    runtime.check_per_channel("gain", gain, z)
    runtime.check_number("factor", factor)
    if len(variation) != 2:
        raise ValueError(f"variation is {tuple(variation)}, expected two weights: along the height, along the width")
    for weight in variation:
        runtime.check_number("variation", weight)
    for name, scalar in (("d_variation", d_variation), ("watch", watch)):
        if scalar is not None:
            runtime.check_tensor(name, scalar)
            if scalar.dim() or not scalar.is_floating_point():
                raise ValueError(f"{name} is {scalar.dtype} {tuple(scalar.shape)}, expected one floating number, 0-d")
            runtime.check_same_device(name, scalar, "z", z)
    dz: Tensor = torch.ops.fastnst.output_to_vgg_input_backward(
        z, du, gain, list(window), tanh, factor, [float(weight) for weight in variation], d_variation, watch
    )
    return dz


def _check(z: Tensor, window: Sequence[int]) -> None:
    kernels.check_three_channels("z", z)
    runtime.check_images("z", z)
    if len(window) != 4 or not all(map(runtime.is_integer, window)):
        raise ValueError(f"window is {tuple(window)}, expected (top, left, height, width)")
    top, left, height, width = window
    if min(top, left) < 0 or min(height, width) < 1 or top + height > z.shape[2] or left + width > z.shape[3]:
        raise ValueError(f"window {tuple(window)} (top, left, height, width) is not inside z {tuple(z.shape)}")
