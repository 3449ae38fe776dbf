"""Both norms, result and gradients, against fp64 and PyTorch's own ops, with everything that they take."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastnst_kernels import batch_norm, batch_norm_reference, instance_norm, instance_norm_reference
from fastnst_kernels.norm import upsample_pad
from fastnst_kernels.norm.upsample_pad import Placement
from helpers.kernel_cases import gradients, parameters, randn
from helpers.tolerances import assert_as_exact_as_torch

EPS = 1e-5


def _with_running(fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, **options: Any) -> torch.Tensor:
        running = (x.new_zeros(x.shape[1], dtype=weight.dtype) for _ in range(2))
        return fn(x, weight, bias, *running, training=True, **options)

    return call


OPS = {"instance": instance_norm, "batch": _with_running(batch_norm)}
REFERENCES = {"instance": instance_norm_reference, "batch": _with_running(batch_norm_reference)}


def place_by_torch(z: torch.Tensor, place: Placement) -> torch.Tensor:
    """PyTorch's own enlargement and padding; it has no symmetric border wider than one pixel."""
    if place.upsample == 2:
        z = F.interpolate(z, scale_factor=2, mode="nearest")
    if place.mode == "symmetric" and max(place.border) > 1:
        return upsample_pad.place_reference(z, Placement(1, place.border, "symmetric"))
    if not any(place.border):
        return z
    return F.pad(z, place.border, {"reflect": "reflect", "symmetric": "replicate", "zeros": "constant"}[place.mode])


def by_torch(norm: str, x, weight, bias, residual=None, *, relu=False, upsample=1, padding=0, padding_mode="reflect"):
    """The chain of PyTorch's ops that the op replaces, in x's dtype."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if norm == "instance":
        y = F.instance_norm(x, weight=weight, bias=bias, eps=EPS)
    else:
        y = F.batch_norm(x, None, None, weight, bias, True, eps=EPS)
    if residual is not None:
        border = (residual.shape[2] - x.shape[2]) // 2
        y = y + F.pad(residual, (-border,) * 4)
    y = y.relu() if relu else y
    return place_by_torch(y, Placement(*upsample_pad.parse(x, upsample, padding, padding_mode)))


def residual_for(x: torch.Tensor, border: int | None) -> torch.Tensor | None:
    """Larger than `x` by `border` at each side; None for None."""
    if border is None:
        return None
    n, c, h, w = x.shape
    return randn((n, c, h + 2 * border, w + 2 * border), x.dtype, x.device, seed=5)


def run(fn: Callable[..., torch.Tensor], x, residual, dtype=None, **options):
    """`fn`'s result and its gradients by x, weight, bias and, if given, residual."""
    inputs = [x, *parameters(x.shape[1], x.device)] + ([] if residual is None else [residual])

    def call(x, weight, bias, residual=None):
        return fn(x, weight, bias, residual=residual, **options)

    place = [options.get(name, default) for name, default in (("upsample", 1), ("padding", 0))]
    place = Placement(*upsample_pad.parse(x, *place, options.get("padding_mode", "reflect")))
    dy = randn(place.shape(x), x.dtype, x.device, seed=99)
    dy = dy.contiguous(memory_format=torch.channels_last) if x.stride(1) == 1 else dy
    return gradients(call, inputs, dy, dtype)


def check(norm: str, x: torch.Tensor, border: int | None = None, **options):
    """The op by the rule of `tolerances`; returns its result and gradients.

    Conditioning is worked out for each result: the largest sum of absolute terms over the largest result.
    """
    residual = residual_for(x, border)
    y, grads = run(OPS[norm], x, residual, **options)
    peer_y, peer_grads = run(lambda *args, **kw: by_torch(norm, *args, **kw), x, residual, **options)
    true_y, true_grads = run(REFERENCES[norm], x, residual, torch.float64, **options)
    weight, _ = parameters(x.shape[1])
    values = x.detach().cpu().double()
    dims = (2, 3) if norm == "instance" else (0, 2, 3)
    scale = (values.var(dims, correction=0, keepdim=True) + EPS).rsqrt() * weight[:, None, None].abs()
    copies = (options.get("upsample", 1) * (2 if options.get("padding") else 1)) ** 2
    assert y.dtype == x.dtype
    size = (values.abs() * scale).max().item()
    assert_as_exact_as_torch(y, peer_y, true_y, conditioning=size / max(true_y.abs().max().item(), 1e-30), what="y")
    names = ("dx", "d_weight", "d_bias", "d_residual")
    terms = (4 * scale.max().item(), x[:, 0].numel() ** 0.5 * 4, x[:, 0].numel() ** 0.5 * 4, 4)
    for name, term, *three in zip(names, terms, grads, peer_grads, true_grads, strict=False):
        conditioning = size + copies * term * (1 + size) / max(three[2].abs().max().item(), 1e-30)
        assert_as_exact_as_torch(*three, dtype=x.dtype, conditioning=conditioning, what=name)
    return y, grads
