"""Stylize tensors and uint8 images within the memory that there is, and say which size fits."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fastnst.device import DTYPES, ran_out_of_memory, resolve_precision
from fastnst.errors import DeviceError, UserError
from fastnst.images import to_array, to_tensor
from fastnst.inference.strips import Strips
from fastnst.memory import available_memory
from fastnst.models.architectures import ARCHITECTURES
from fastnst.models.transform_net import SMALLEST_SIDE, TransformNet
from fastnst.progress import byte_count

log = logging.getLogger(__name__)

# Measured peaks. On a CPU, PyTorch has no half-precision kernels for some of the layers and unfolds them.
_BYTES_PER_PIXEL = 520
_BYTES_PER_STRIP_PIXEL = 1600
_HALF_ON_CPU = 10.4  # times as much
_STRIP_HALO = 8  # rows of the layer before the last, beside those of a strip
_FIXED_BYTES = 96 * 2**20  # code that is loaded with the first convolution, and what allocators keep
_BORDER = 2 * max(spec.border for spec in ARCHITECTURES.values())

# A whole image up to this size: on a CPU what takes some two seconds on two cores, since strips are about as fast,
# show progress and leave memory to others; on a GPU what leaves half of it, and what the norms' kernels can count.
_WHOLE_ON_CPU_BYTES = 2**30
_WHOLE_ON_GPU_SHARE = 0.5
_WHOLE_ON_GPU_PIXELS = 2**31 // max(spec.base_width for spec in ARCHITECTURES.values()) - 1
# Of a strip. On a CPU its tensors are small enough for malloc to reuse their memory.
_STRIP_PIXELS = {"cpu": 2**17, "cuda": 2**21}


def stylize(model: TransformNet, images: Tensor, *, precision: str = "auto") -> Tensor:
    """Stylize images, each as a whole; for large ones `stylize_pixels` takes far less memory.

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
    try:
        with _evaluating(model, device, dtype):
            output: Tensor = model(images.to(device, torch.float32))
            return output.clamp_(0, 1).to(images.device)
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
    # Outside the except block, so that the failed pass has freed its memory.
    count, _, height, width = images.shape
    available = available_memory(device)
    scale = math.sqrt(available / _whole_bytes(count, height, width, device, dtype))
    raise _too_large(count, height, width, device, dtype, available, scale)


def stylize_pixels(
    model: TransformNet,
    pixels: np.ndarray,
    *,
    precision: str = "auto",
    memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Stylize one image of any size within a limit of memory.

    A small image is computed as a whole (`stylize`). A large one is computed in strips of rows, with norm statistics
    over the whole image and the same result up to rounding; see `fastnst.inference.strips`.

    Args:
        model: the network; it runs on its device, in evaluation mode, and returns to its mode.
        pixels: uint8 RGB `[H, W, 3]` with sides of 16 pixels or more.
        precision: type of convolutions, `bf16`, `fp16` or `fp32`; `auto` is `fp32`.
        memory: bytes of the model's device to use beside what is used already; None: what is available.
        progress: called with (strips done, strips in total), from the beginning; never for a small image.

    Returns:
        uint8 RGB `[H, W, 3]`.

    Raises:
        UserError: another shape or type, or an unknown precision.
        DataError: the result is not finite.
        DeviceError: too little memory even for strips, with a size that fits; or the device lacks the precision.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or min(pixels.shape[:2]) < SMALLEST_SIDE:
        raise UserError(
            f"an image is uint8 [H, W, 3] with sides of {SMALLEST_SIDE} pixels or more, got {pixels.dtype} "
            f"{list(pixels.shape)}; convert or enlarge it"
        )
    height, width = pixels.shape[:2]
    device = next(model.parameters()).device
    dtype = DTYPES[resolve(precision, device)]
    available = available_memory(device) if memory is None else memory
    if _whole_bytes(1, height, width, device, dtype) <= _whole_limit(height, width, device, available):
        return to_array(stylize(model, to_tensor(pixels), precision=precision))
    strips = _strips_that_fit(model, pixels, device, dtype, available)
    log.info("stylizing %d × %d px in %d strips", width, height, len(strips))
    try:
        with _evaluating(model, device, dtype):
            return _joined(strips, pixels.shape, progress or (lambda _done, _total: None))
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
    raise DeviceError(
        f"{device} ran out of memory for {width} × {height} px, although {byte_count(available)} were there at the "
        "start; free what else takes it, or scale the image down"
    )


def resolve(precision: str, device: torch.device) -> str:
    return "fp32" if precision == "auto" else resolve_precision(precision, device)


@contextlib.contextmanager
def _evaluating(model: TransformNet, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    was_training = model.training
    model.eval()  # batch norm: running statistics, unchanged
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            yield
    finally:
        model.train(was_training)


def _joined(strips: Strips, shape: tuple[int, ...], progress: Callable[[int, int], None]) -> np.ndarray:
    result, total = np.empty(shape, np.uint8), len(strips)
    progress(0, total)
    for done, strip in enumerate(strips, 1):
        if strip is not None:
            first, rows = strip
            result[first : first + rows.shape[2]] = to_array(rows)
        progress(done, total)
    return result


def _strips_that_fit(
    model: TransformNet, pixels: np.ndarray, device: torch.device, dtype: torch.dtype, available: int
) -> Strips:
    """Return strips as high as is useful and fits; DeviceError if not even single rows fit."""
    height, width = pixels.shape[:2]
    wanted = max(1, _STRIP_PIXELS[device.type] // (width + _BORDER))
    strips = Strips(model, pixels, rows=wanted, dtype=dtype)
    square = strips.workspace_bytes + (pixels.nbytes if device.type == "cpu" else 0)
    linear = _strip_bytes(1, width, device, dtype)
    room = available - _FIXED_BYTES
    fitting = int((room - square) / linear) - _STRIP_HALO
    if fitting >= 1:
        return strips if fitting >= wanted else Strips(model, pixels, rows=fitting, dtype=dtype)
    # What is kept grows with the square of the scale, a strip with the scale.
    linear *= 1 + _STRIP_HALO
    scale = (math.sqrt(linear**2 + 4 * square * max(0, room)) - linear) / (2 * square)
    raise _too_large(1, height, width, device, dtype, available, scale)


def _too_large(
    count: int, height: int, width: int, device: torch.device, dtype: torch.dtype, available: int, scale: float
) -> DeviceError:
    """Say that images need more memory than there is; with sides, borders included, times `scale` they just fit."""
    shown = f"{width} × {height} px" if count == 1 else f"{count} images of {width} × {height} px"
    scaled = [int((side + _BORDER) * 0.95 * scale) - _BORDER for side in (width, height)]
    fits = f"; about {scaled[0]} × {scaled[1]} px would fit" if scale < 1 and min(scaled) >= SMALLEST_SIDE else ""
    other = " or use --device cpu" if device.type == "cuda" else ""
    half = "; fp32 needs a tenth" if device.type == "cpu" and dtype != torch.float32 else ""
    return DeviceError(
        f"{device} has too little memory for {shown}, {byte_count(available)}{fits}{half}; scale it down{other}"
    )


def _whole_limit(height: int, width: int, device: torch.device, available: int) -> float:
    if device.type == "cpu":
        return min(available, _WHOLE_ON_CPU_BYTES)
    countable = (height + _BORDER) * (width + _BORDER) <= _WHOLE_ON_GPU_PIXELS
    return _WHOLE_ON_GPU_SHARE * available if countable else 0


def _whole_bytes(count: int, height: int, width: int, device: torch.device, dtype: torch.dtype) -> float:
    return count * (height + _BORDER) * (width + _BORDER) * _BYTES_PER_PIXEL * _unfolding(device, dtype)


def _strip_bytes(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> float:
    return rows * (width + _BORDER) * _BYTES_PER_STRIP_PIXEL * _unfolding(device, dtype)


def _unfolding(device: torch.device, dtype: torch.dtype) -> float:
    return _HALF_ON_CPU if device.type == "cpu" and dtype != torch.float32 else 1.0
