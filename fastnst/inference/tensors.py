"""Stylize tensors, and say which size fits into memory."""

import math
from pathlib import Path

import torch
from torch import Tensor

from fastnst.device import DTYPES, ran_out_of_memory, resolve_precision
from fastnst.errors import DeviceError, UserError
from fastnst.models.architectures import ARCHITECTURES
from fastnst.models.transform_net import TransformNet

# Measured peak of a forward pass per pixel. On a CPU, PyTorch has no half-precision kernels for some of the layers and
# unfolds them.
_BYTES_PER_PIXEL = 520
_BYTES_PER_PIXEL_HALF_ON_CPU = 5400
_BORDER = 2 * max(spec.border for spec in ARCHITECTURES.values())


def stylize(model: TransformNet, images: Tensor, *, precision: str = "auto") -> Tensor:
    """Stylize images.

    Args:
        model: the network; it runs on its device, in evaluation mode, and returns to its mode.
        images: RGB in [0, 1], `[N, 3, H, W]` with sides of 16 pixels or more, on any device.
        precision: type of convolutions, `bf16`, `fp16` or `fp32`; `auto` is `fp32`.

    Returns:
        RGB in [0, 1], fp32 `[N, 3, H, W]`, channels_last, on the device of `images`, without gradient.

    Raises:
        UserError: another shape, integers instead of floats, or an unknown precision.
        DeviceError: too little memory, or the device lacks the precision.
    """
    if not images.is_floating_point():
        raise UserError(f"images are floats in [0, 1], got {images.dtype}; divide by 255 first")
    device = next(model.parameters()).device
    dtype = DTYPES[resolve(precision, device)]
    was_training = model.training
    model.eval()  # batch norm: running statistics, unchanged
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            output: Tensor = model(images.to(device, torch.float32))
            return output.clamp_(0, 1).to(images.device)
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
    finally:
        model.train(was_training)
    # Outside the except block, so that the failed pass has freed its memory.
    count, _, height, width = images.shape
    raise too_large(count, height, width, device, precision)


def resolve(precision: str, device: torch.device) -> str:
    return "fp32" if precision == "auto" else resolve_precision(precision, device)


def too_large(count: int, height: int, width: int, device: torch.device, precision: str) -> DeviceError:
    shown = f"{width} × {height} px" if count == 1 else f"{count} images of {width} × {height} px"
    free = free_bytes(device)
    fits = ""
    if free is not None:
        scale = math.sqrt(free / needed_bytes(count, height, width, device, precision))
        if scale < 1:
            fits = f"; about {int(width * scale * 0.95)} × {int(height * scale * 0.95)} px would fit"
    other = " or use --device cpu" if device.type == "cuda" else ""
    half = "; fp32 needs a tenth" if device.type == "cpu" and precision != "fp32" else ""
    return DeviceError(f"{device} has too little memory for {shown}{fits}{half}; scale it down{other}")


def needed_bytes(count: int, height: int, width: int, device: torch.device, precision: str) -> int:
    unfolds = device.type == "cpu" and precision != "fp32"
    per_pixel = _BYTES_PER_PIXEL_HALF_ON_CPU if unfolds else _BYTES_PER_PIXEL
    return count * (height + _BORDER) * (width + _BORDER) * per_pixel


def free_bytes(device: torch.device) -> int | None:
    """Memory available to a forward pass; None if unknown."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":", 1) for line in lines)
    return int(sizes["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in sizes else None
