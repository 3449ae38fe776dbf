"""Which batch size or image size fits into memory, and the messages that say so."""

import bisect
import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastnst.config import Config
from fastnst.device import ran_out_of_memory
from fastnst.errors import DeviceError, UserError
from fastnst.memory import available_memory
from fastnst.models.architectures import ARCHITECTURES
from fastnst.progress import byte_count
from fastnst.training.distributed.environment import DistEnv, local_config
from fastnst.training.memory.estimate import Estimate, estimate
from fastnst.training.step.graphed_step import capture_unsupported_reason, wants_capture

RESERVE_BYTES = 2**30
"""Not part of the estimate: decoding and its processes, workspaces of convolutions, the allocator's rounding."""
RESERVE_SHARE = 0.25
"""Of the activations: gradients and temporaries at the peak. Counted on the live tensors with each preset, in fp32 and
bf16, these are 2 to 11% of the saved activations with the fused engine at 256 pixels, and 11 to 21% with autograd at
256 and 512."""
SIZE_STEP = 16
_SINGLE_PROCESS = DistEnv()
_PLENTY_PER_PIXEL = 6 * 2**10
"""Bytes of activations per pixel of a batch, more than any preset saves: with as much there is nothing to estimate."""

_STYLE_BYTES_PER_PIXEL = 2 * 64 * 4
"""Input and output of φ's widest layer, conv1_2, in fp32: the least that φ takes."""

log = logging.getLogger(__name__)


def required_memory(need: Estimate) -> int:
    """Return the bytes that should be available for a run: the estimate and a reserve."""
    return need.memory + int(RESERVE_SHARE * need.activations) + RESERVE_BYTES


def largest_that_fits(config: Config, available: int, *, device_type: str, styles: int = 1) -> tuple[int, int] | None:
    """Find the largest `train.batch_size` that fits, or else the largest image size for a single image.

    Args are those of `estimate`, and the available bytes.

    Returns:
        Batch size, at most that of `config`, and image size: that of `config`, or a smaller multiple of 16 if not even
        a single image fits. None if nothing fits.
    """

    def resized(batch_size: int, side: int) -> Estimate:
        train = config.train.model_copy(update={"batch_size": batch_size})
        data = config.data.model_copy(update={"image_size": side})
        return estimate(
            config.model_copy(update={"train": train, "data": data}), device_type=device_type, styles=styles
        )

    side, batch_size = config.data.image_size, config.train.batch_size
    single = resized(1, side)
    if required_memory(single) <= available:
        # Activations are proportional to the batch size.
        per_image = required_memory(resized(2, side)) - required_memory(single)
        return min(batch_size, 1 + (available - required_memory(single)) // per_image), side
    if single.weights + RESERVE_BYTES > available:
        return None
    return _largest_image(lambda smaller: required_memory(resized(1, smaller)), side, available)


def _largest_image(required: Callable[[int], int], side: int, available: int) -> tuple[int, int] | None:
    """Search for the largest multiple of `SIZE_STEP` below `side` that fits."""

    def required_or_zero(size: int) -> int:
        try:
            return required(size)
        except UserError:
            return 0  # too small an image for a layer of the loss

    sizes = range(SIZE_STEP, side, SIZE_STEP)
    fitting = bisect.bisect_right(sizes, available, key=required_or_zero)
    return (1, sizes[fitting - 1]) if fitting and required_or_zero(sizes[fitting - 1]) else None


def available_memory_per_process(device: torch.device, dist_env: DistEnv) -> int:
    """Return `available_memory`, divided among the processes of this machine unless each has its own GPU."""
    return available_memory(device) // (1 if device.type == "cuda" else dist_env.local_world_size)


@contextlib.contextmanager
def explained_memory_errors(
    config: Config, device: torch.device, dist_env: DistEnv = _SINGLE_PROCESS, *, styles: int = 1
) -> Iterator[None]:
    """Turn out-of-memory errors into a DeviceError that says what would fit; `config` is resolved (no `auto`)."""
    available = available_memory_per_process(device, dist_env)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        # Free the failed step's tensors, which its frames hold: the estimate needs some memory, too.
        traceback.clear_frames(error.__traceback__)
        # On a CPU 16-bit types take more memory, not less.
        in_fp32 = config.train.precision == "fp32" and device.type == "cuda"
        other = ", or use --precision bf16" if in_fp32 else ""
        unsupported = capture_unsupported_reason(config.train, processes=dist_env.world_size)
        if wants_capture(config.train, device) and unsupported is None:
            other += ", or --set train.capture=off, which frees a step's memory between steps"
        raise DeviceError(
            f"out of memory with train.batch_size = {config.train.batch_size} at data.image_size = "
            f"{config.data.image_size}; {_advice(config, available, device, dist_env, styles)}{other}"
        ) from error


def describe_shortage(
    config: Config, need: Estimate, available: int, *, device_type: str, processes: int = 1, styles: int = 1
) -> str | None:
    """Say what to change if a run should not fit into memory; None if it should fit.

    Args:
        config: see `estimate`, with one process's share of the batch.
        need: estimate of `config`.
        available: bytes per process.
        device_type: `cuda` or `cpu`.
        processes: number of processes that share a batch.
        styles: number of styles trained together.
    """
    if required_memory(need) <= available:
        return None
    each = "" if processes == 1 else f", in each of {processes} processes"
    shortage = (
        f"it needs about {byte_count(required_memory(need))}, reserve included, and {byte_count(available)} are "
        f"there{each}"
    )
    match largest_that_fits(config, available, device_type=device_type, styles=styles):
        case (batch_size, side) if side == config.data.image_size:
            return f"{shortage}: set train.batch_size = {batch_size * processes}, the largest that should fit"
        case (_, side):
            return (
                f"{shortage}: not even train.batch_size = {processes} should fit; with it set data.image_size = "
                f"{side}, the largest that should"
            )
        case _:
            return f"{shortage}: no train.batch_size or data.image_size should fit; use a device with more memory"


def warn_of_shortage(config: Config, device: torch.device, dist_env: DistEnv, *, styles: int = 1) -> None:
    """Warn, before a run, if it should not fit into memory; args as `explained_memory_errors`."""
    available, local = available_memory_per_process(device, dist_env), local_config(config, dist_env)
    if available >= plenty(local, styles=styles):
        return
    try:
        need = estimate(local, device_type=device.type, styles=styles)
        shortage = describe_shortage(
            local, need, available, device_type=device.type, processes=dist_env.world_size, styles=styles
        )
    except (RuntimeError, MemoryError, UserError):
        return  # as in the run itself, which will say it
    if shortage:
        log.warning("memory: %s", shortage)


def check_style_fits(style: Tensor, device: torch.device, dist_env: DistEnv) -> None:
    """Raise DeviceError if φ cannot be computed on the style image `[1, 3, H, W]`, whose size is not the batch's."""
    available, (height, width) = available_memory_per_process(device, dist_env), style.shape[2:]
    needed = _STYLE_BYTES_PER_PIXEL * height * width
    if needed > available:
        side = int(max(height, width) * (available / needed) ** 0.5) // SIZE_STEP * SIZE_STEP
        fits = f"set style.size = {side}" if side >= SIZE_STEP else "use a device with more memory"
        raise DeviceError(
            f"the style image of {width} × {height} px needs {byte_count(needed)} or more for its features, and "
            f"{byte_count(available)} are there; {fits}"
        )


def plenty(config: Config, *, styles: int) -> int:
    """Return bytes that are more than `required_memory` of a run with `config`, without its slow estimate."""
    side = config.data.image_size + 2 * ARCHITECTURES[config.model.architecture].border
    return RESERVE_BYTES + styles * 2**30 + _PLENTY_PER_PIXEL * config.train.batch_size * side**2


def _advice(config: Config, available: int, device: torch.device, dist_env: DistEnv, styles: int) -> str:
    processes, local = dist_env.world_size, local_config(config, dist_env)
    try:
        need = estimate(local, device_type=device.type, styles=styles)
        shortage = describe_shortage(
            local, need, available, device_type=device.type, processes=processes, styles=styles
        )
    except (RuntimeError, MemoryError, UserError):
        return "lower one of them"
    if shortage is not None:
        return shortage
    batch_size, side = config.train.batch_size, config.data.image_size
    half = batch_size // 2 // processes * processes
    fix = f"train.batch_size = {half}" if half else f"a data.image_size below {side}"
    return (
        f"it needs about {byte_count(required_memory(need))}, reserve included, and {byte_count(available)} were there "
        f"when the run began, so something else has taken memory since: free it, or set {fix}"
    )
