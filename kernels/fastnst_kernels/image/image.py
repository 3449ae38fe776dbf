"""Pictures at the ends of a network: bytes into its first convolution, and from one network into the next.

Legend: pictures have 3 channels and are channels_last, in memory rows of 3·W numbers.

Into a network, x in bytes `[N, 3, H, W]`, c a channel, p pixels of border that mirror the picture:

    y[:, c] = reflect(factor·scale[c]·x[:, c] + shift[c], p)

Between a transform net, whose last layer put out z `[N, 3, Hz, Wz]`, and a loss network, whose first convolution wants
u; the stylised picture s lies in a window of z, act is tanh or nothing:

    s = factor·act(z[window]) + offset          u[:, c] = (s[:, c] − mean[c])·gain[c]
    V = Σ (s[h + 1] − s[h])²    Q = Σ (s[w + 1] − s[w])²    per picture, the sums of total variation

and back, with L = f(u) + a·ΣV + b·ΣQ, a and b the same numbers for all pictures:

    ∂L/∂s = gain·∂L/∂u + 2a·((s[h] − s[h − 1]) − (s[h + 1] − s[h])) + 2b·(likewise along w), without missing neighbours
    ∂L/∂z = factor·act'·∂L/∂s in the window, 0 around it;    act' = 1 − tanh² or 1

s itself is never written: the backward makes it again from z, which is half as long in 16 bits as s in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnst_kernels import runtime
from fastnst_kernels.image import kernels as pictures_kernels


def picture_input_reference(
    pictures: Tensor,
    factor: float = 1.0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The formula in PyTorch, in fp32 (fp64 for fp64); same arguments as `picture_input`."""
    rows = pictures.permute(0, 2, 3, 1)
    if padding:
        for dimension in (1, 2):
            rows = rows.index_select(dimension, _mirrored(rows.shape[dimension], padding, rows.device))
    y = rows.permute(0, 3, 1, 2).to(torch.promote_types(dtype, torch.float32))
    y = y * (factor if scale is None else (factor * scale.to(y.dtype)).view(3, 1, 1))
    y = y if shift is None else y.add_(shift.to(y.dtype).view(3, 1, 1))
    return y.to(dtype)


def _mirrored(side: int, padding: int, device: torch.device) -> Tensor:
    """Which of `side` pixels lies at each place of a row with its border, mirrored as often as it takes."""
    period = 2 * (side - 1)
    place = torch.arange(-padding, side + padding, device=device).abs() % period
    return torch.minimum(place, period - place)


def _inside(x: Tensor, window: Sequence[int]) -> Tensor:
    top, left, height, width = window
    return x[:, :, top : top + height, left : left + width]


def _activated(z: Tensor, window: Sequence[int], tanh: bool) -> Tensor:
    """act(z[window]), at least fp32."""
    x = _inside(z, window).to(torch.promote_types(z.dtype, torch.float32))
    return x.tanh() if tanh else x


def network_boundary_reference(
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
    """The formula in PyTorch, differentiable in z; same arguments as `network_boundary`."""
    s = factor * _activated(z, window, tanh) + offset
    u = (s - mean.to(s.dtype).view(3, 1, 1)) * gain.to(s.dtype).view(3, 1, 1)
    differences = s[:, :, 1:] - s[:, :, :-1], s[..., 1:] - s[..., :-1]
    sums = [difference.square().sum((1, 2, 3)) for difference in differences]
    return u.to(dtype), torch.stack([*sums, (s * 0.0).sum((1, 2, 3))], 1)


def network_boundary_backward_reference(
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
    """The formula in PyTorch, in fp32 (fp64 for fp64); same arguments as `network_boundary_backward`."""
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


def _allocate(n: int, height: int, width: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`[N, 3, height, width]`, channels_last."""
    return runtime.allocate((n, height, width, 3), like, dtype).permute(0, 3, 1, 2)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("fastnst::picture_input", mutates_args=())
def _picture_input(
    pictures: Tensor, factor: float, scale: Tensor | None, shift: Tensor | None, padding: int, dtype: torch.dtype
) -> Tensor:
    pictures = _dense(pictures)
    n, _, height, width = pictures.shape
    y = _allocate(n, height + 2 * padding, width + 2 * padding, pictures, dtype)
    if runtime.implementation(y) == "reference":
        return y.copy_(picture_input_reference(pictures, factor, scale, shift, padding=padding, dtype=dtype))
    scale, shift = (None if vector is None else vector.contiguous() for vector in (scale, shift))
    pictures_kernels.picture_input(pictures, factor, scale, shift, y, padding)
    return y


@_picture_input.register_fake
def _(
    pictures: Tensor, factor: float, scale: Tensor | None, shift: Tensor | None, padding: int, dtype: torch.dtype
) -> Tensor:
    n, _, height, width = pictures.shape
    return _allocate(n, height + 2 * padding, width + 2 * padding, pictures, dtype)


@torch.library.custom_op("fastnst::network_boundary", mutates_args=())
def _network_boundary(
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
    u = _allocate(z.shape[0], window[2], window[3], z, dtype)
    if _in_pytorch(z, u):
        made, sums = network_boundary_reference(
            z, mean, gain, window=window, tanh=tanh, factor=factor, offset=offset, dtype=dtype
        )
        return u.copy_(made), sums
    partial = pictures_kernels.boundary(z, mean.contiguous(), gain.contiguous(), u, window, tanh, factor, offset)
    return u, partial.sum(1)


@_network_boundary.register_fake
def _(
    z: Tensor,
    mean: Tensor,
    gain: Tensor,
    window: Sequence[int],
    tanh: bool,
    factor: float,
    offset: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    sums = runtime.allocate((z.shape[0], 3), z, runtime.statistics_dtype(z))
    return _allocate(z.shape[0], window[2], window[3], z, dtype), sums


@torch.library.custom_op("fastnst::network_boundary_backward", mutates_args=())
def _network_boundary_backward(
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
    dz = _allocate(z.shape[0], z.shape[2], z.shape[3], z, z.dtype)
    if _in_pytorch(z, du):
        made = network_boundary_backward_reference(
            *(z, du, gain),
            window=window,
            tanh=tanh,
            factor=factor,
            variation=variation,
            d_variation=d_variation,
            watch=watch,
        )
        return dz.copy_(made)
    pictures_kernels.boundary_backward(
        z, du, gain.contiguous(), dz, window, tanh, factor, variation, d_variation, watch
    )
    return dz


@_network_boundary_backward.register_fake
def _(
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
    return _allocate(z.shape[0], z.shape[2], z.shape[3], z, z.dtype)


def _in_pytorch(*tensors: Tensor) -> bool:
    return any(runtime.implementation(tensor) == "reference" for tensor in tensors)


def picture_input(
    pictures: Tensor,
    factor: float = 1.0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`factor·scale[c]·pictures[:, c] + shift[c]` with a mirrored border, in one pass from bytes.

    Bytes have no gradient; pictures that want one are floating and take PyTorch's own operations.

    Args:
        pictures: `[N, 3, H, W]` uint8; channels_last, as a batch `[N, H, W, 3]` is once permuted, is not copied.
        factor: of all channels.
        scale: `[3]`, floating; None: 1.
        shift: `[3]`, floating; None: 0.
        padding: pixels of border at each side, mirrored about the border pixel, which is not repeated; where it is
            wider than what it mirrors, the reflection is repeated, as in `numpy.pad(mode="reflect")`.
        dtype: of the result: float32, float16, bfloat16 or, on the reference path, float64.

    Returns:
        `[N, 3, H + 2·padding, W + 2·padding]`, channels_last, computed in float32 (float64 for float64).

    Raises:
        ValueError: another shape or dtype, a negative border, or one around a single row or column.
    """
    _check_three("pictures", pictures)
    if pictures.dtype != torch.uint8:
        raise ValueError(f"pictures are {pictures.dtype}, expected torch.uint8")
    if padding < 0 or (padding and min(pictures.shape[2:]) < 2):
        raise ValueError(
            f"padding is {padding} for pictures {tuple(pictures.shape)}: expected 0 or more, "
            "and 0 where a side has one pixel, which mirrors nothing"
        )
    _check_dtype(dtype)
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None:
            runtime.check_per_channel(name, vector, pictures)
    y: Tensor = torch.ops.fastnst.picture_input(pictures, factor, scale, shift, padding, dtype)
    return y


@torch.no_grad()
def network_boundary(
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
    """From what a transform net's last layer put out to what a loss network's first takes, and total variation.

    For callers that chain gradients themselves: the backward is `network_boundary_backward`.

    Args:
        z: `[N, 3, Hz, Wz]`, float32, float16, bfloat16 (float64 on the reference path); channels_last is not copied.
        mean: `[3]`, floating.
        gain: `[3]`, floating.
        window: (top, left, height, width) of the stylised pictures s in z.
        tanh: whether s = factor·tanh(z) + offset; else s = factor·z + offset.
        factor: see above.
        offset: see above.
        dtype: of u.

    Returns:
        u: `[N, 3, height, width]`, (s − mean)·gain, channels_last.
        sums: `[N, 3]` in float32 (float64 for float64): of the squared differences of neighbours along the height,
            along the width, and 0, or NaN where s is not finite.

    Raises:
        ValueError: shapes, dtypes or devices do not go together, or the window leaves z.
    """
    _check_boundary(z, window)
    _check_dtype(dtype)
    for name, vector in (("mean", mean), ("gain", gain)):
        runtime.check_per_channel(name, vector, z)
    u, sums = torch.ops.fastnst.network_boundary(z, mean, gain, list(window), tanh, factor, offset, dtype)
    return u, sums


@torch.no_grad()
def network_boundary_backward(
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
    """∂L/∂z of L = f(u) + d_variation·(variation[0]·Σ sums[:, 0] + variation[1]·Σ sums[:, 1]), in one pass.

    Args:
        z: as in `network_boundary`, likewise `gain`, `window`, `tanh` and `factor`.
        du: ∂f/∂u `[N, 3, height, width]`, any floating type.
        gain: see above.
        window: see above.
        tanh: see above.
        factor: see above.
        variation: weights of the sums along the height and along the width.
        d_variation: 0-d, floating; None: 1.
        watch: 0-d, floating: added to all values in the window, such as NaN where the loss is; None: 0.

    Returns:
        `[N, 3, Hz, Wz]` in z's dtype, channels_last; 0 outside the window.

    Raises:
        ValueError: shapes, dtypes or devices do not go together, or the window leaves z.
    """
    _check_boundary(z, window)
    runtime.check_images("du", du)
    if tuple(du.shape) != (z.shape[0], 3, *window[2:]):
        raise ValueError(f"du has shape {tuple(du.shape)}, expected {(z.shape[0], 3, *window[2:])}: the window's")
    runtime.check_same_device("du", du, "z", z)
    runtime.check_per_channel("gain", gain, z)
    if len(variation) != 2:
        raise ValueError(f"variation is {tuple(variation)}, expected two weights: along the height, along the width")
    for name, scalar in (("d_variation", d_variation), ("watch", watch)):
        if scalar is not None:
            if scalar.dim() or not scalar.is_floating_point():
                raise ValueError(f"{name} is {scalar.dtype} {tuple(scalar.shape)}, expected one floating number, 0-d")
            runtime.check_same_device(name, scalar, "z", z)
    dz: Tensor = torch.ops.fastnst.network_boundary_backward(
        z, du, gain, list(window), tanh, factor, [float(weight) for weight in variation], d_variation, watch
    )
    return dz


def _check_three(name: str, x: Tensor) -> None:
    if x.dim() != 4 or x.shape[1] != 3 or x.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected [N, 3, H, W] with at least one pixel")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in runtime.REFERENCE_DTYPES:
        raise ValueError(f"dtype is {dtype}, expected float32, float16, bfloat16 or float64")


def _check_boundary(z: Tensor, window: Sequence[int]) -> None:
    _check_three("z", z)
    runtime.check_images("z", z)
    if len(window) != 4:
        raise ValueError(f"window is {tuple(window)}, expected (top, left, height, width)")
    top, left, height, width = window
    if min(top, left) < 0 or min(height, width) < 1 or top + height > z.shape[2] or left + width > z.shape[3]:
        raise ValueError(f"window {tuple(window)} (top, left, height, width) does not lie in z {tuple(z.shape)}")
