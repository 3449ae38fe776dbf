"""Both norms, result and gradients, against fp64 and PyTorch's own ops, with all options."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastnst_kernels import batch_norm, batch_norm_reference, instance_norm, instance_norm_reference
from fastnst_kernels.norm.upsample_pad import UpsamplePad, upsample_pad_reference
from helpers.kernel_cases import gradients, parameters, randn
from helpers.tolerances import assert_as_exact_as_torch

EPS = 1e-5
PAD_OPTIONS = {"upsample": 1, "padding": 0, "padding_mode": "reflect"}
NORMS = ("instance", "batch", "inference")  # batch norm in training, and with running statistics


def running_statistics(channels: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
    return [randn((channels,), torch.bfloat16, device, seed=31).to(dtype), torch.full((channels,), 1.5, device=device)]


def op(norm: str, reference: bool = False) -> Callable[..., torch.Tensor]:
    """The norm, called with (x, weight, bias, running statistics, **options)."""

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, running: Any = None, **options: Any):
        if norm == "instance":
            return (instance_norm_reference if reference else instance_norm)(x, weight, bias, **options)
        running = running_statistics(x.shape[1], x.device) if running is None else running
        batch = batch_norm_reference if reference else batch_norm
        return batch(x, weight, bias, *running, training=norm == "batch", **options)

    return call


def torch_upsample_pad(z: torch.Tensor, pad: UpsamplePad) -> torch.Tensor:
    """PyTorch's own upsampling and padding; it has no symmetric padding wider than one pixel."""
    if pad.upsample == 2:
        z = F.interpolate(z, scale_factor=2, mode="nearest")
    if pad.mode == "symmetric" and max(pad.padding) > 1:
        return upsample_pad_reference(z, UpsamplePad(1, pad.padding, "symmetric"))
    if not any(pad.padding):
        return z
    return F.pad(z, pad.padding, {"reflect": "reflect", "symmetric": "replicate", "zeros": "constant"}[pad.mode])


def by_torch(norm: str, x, weight, bias, running, *, residual=None, relu=False, eps=EPS, **pad):
    """The chain of PyTorch's ops that the op replaces, in x's dtype."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if norm == "instance":
        y = F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    else:
        own = [statistic.to(x.dtype, copy=True) for statistic in running]
        y = F.batch_norm(x, *own, weight, bias, norm == "batch", eps=eps)
        for statistic, moved in zip(running, own, strict=True):
            statistic.copy_(moved)
    if residual is not None:
        border = (residual.shape[2] - x.shape[2]) // 2
        y = y + F.pad(residual, (-border,) * 4)
    y = y.relu() if relu else y
    return torch_upsample_pad(y, UpsamplePad.checked(x, **PAD_OPTIONS | pad))


def residual_for(x: torch.Tensor, border: int | None) -> torch.Tensor | None:
    """Larger than `x` by `border` at each side; None for None."""
    if border is None:
        return None
    n, c, h, w = x.shape
    return randn((n, c, h + 2 * border, w + 2 * border), x.dtype, x.device, seed=5)


def run(fn: Callable[..., torch.Tensor], x, residual=None, dtype=None, dy=None, **options):
    """`[y, dx, d_weight, d_bias, d_residual if there is one]` and the running statistics after the call."""
    inputs = [x, *parameters(x.shape[1], x.device)] + ([] if residual is None else [residual])
    running = running_statistics(x.shape[1], x.device)
    running = running if dtype is None else [statistic.to(dtype) for statistic in running]

    def call(x, weight, bias, residual=None):
        return fn(x, weight, bias, running, residual=residual, **options)

    if dy is None:
        pad = PAD_OPTIONS | {name: value for name, value in options.items() if name in PAD_OPTIONS}
        dy = randn(UpsamplePad.checked(x, **pad).shape(x), x.dtype, x.device, seed=99)
        dy = dy.contiguous(memory_format=torch.channels_last) if x.stride(1) == 1 else dy
    y, grads = gradients(call, inputs, dy, dtype)
    return [y, *grads], running


def check(norm: str, x, border: int | None = None, *, conditioning: float | None = None, dy=None, **options):
    """The op by the rule of `tolerances`; returns `[y, dx, …]`.

    Without `conditioning` it is worked out for each result: the largest sum of absolute terms over the largest result.
    """
    residual = residual_for(x, border)
    results, running = run(op(norm), x, residual, dy=dy, **options)
    peers, peer_running = run(lambda *args, **kw: by_torch(norm, *args, **kw), x, residual, dy=dy, **options)
    truth, true_running = run(op(norm, reference=True), x, residual, torch.float64, dy=dy, **options)
    assert results[0].dtype == x.dtype
    terms = x[:, 0].numel() ** 0.5
    if conditioning is None:
        limits, of_running = _conditioning(norm, x, truth, terms, options)
    else:
        limits = [conditioning, conditioning, conditioning + terms, conditioning + terms, conditioning]
        of_running = conditioning
    names = ("y", "dx", "d_weight", "d_bias", "d_residual")
    for name, limit, *three in zip(names, limits, results, peers, truth, strict=False):
        assert_as_exact_as_torch(*three, dtype=x.dtype, conditioning=limit, what=name)
    if norm == "batch":
        for name, *three in zip(("running_mean", "running_var"), running, peer_running, true_running, strict=True):
            assert_as_exact_as_torch(*three, conditioning=of_running, what=name)
    return results


def _conditioning(norm: str, x, truth, terms: float, options: dict[str, Any]) -> tuple[list[float], float]:
    weight, _ = parameters(x.shape[1])
    values = x.detach().cpu().double()
    dims = (2, 3) if norm == "instance" else (0, 2, 3)
    scale = (values.var(dims, correction=0, keepdim=True) + EPS).rsqrt() * weight[:, None, None].abs()
    copies = (options.get("upsample", 1) * (2 if options.get("padding") else 1)) ** 2
    size = (values.abs() * scale).max().item()
    largest = [max(result.abs().max().item(), 1e-30) for result in truth]
    factors = (4 * scale.max().item(), 4 * terms, 4 * terms, 4)
    limits = [size + copies * factor * (1 + size) / most for factor, most in zip(factors, largest[1:], strict=False)]
    return [size / largest[0], *limits], size
