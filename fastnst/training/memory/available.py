"""How much memory a run may use, and what would fit into it."""

import contextlib
import os
import resource
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastnst.config import Config
from fastnst.device import ran_out_of_memory
from fastnst.errors import DeviceError, UserError
from fastnst.progress import byte_count
from fastnst.training.distributed.environment import DistEnv, local_config
from fastnst.training.memory.estimate import Estimate, estimate
from fastnst.training.step.graphed_step import capture_unsupported_reason

RESERVE_BYTES = 2**30
"""What an estimate does not see: decoding and its processes, workspaces of convolutions, the allocator's rounding."""
RESERVE_SHARE = 0.25
"""Of the activations: gradients and passing results at the peak. Counted on the tensors that live then, with each
preset, in fp32 and bf16, these are 2 to 11% of what is kept with the fused engine, at 256 pixels, and 11 to 21% of what
autograd keeps, at 256 and 512."""
SIZE_STEP = 16
ALONE = DistEnv()


def needed_memory(need: Estimate) -> int:
    """Bytes that should be there for a run: the estimate and a reserve."""
    return need.memory + int(RESERVE_SHARE * need.activations) + RESERVE_BYTES


def available_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that this process may use, beside what it uses already.

    On a GPU: what is free, and what PyTorch holds without using it. On a CPU: what the system calls available, or what
    is left of a control group's limit (of containers and batch systems) or of `ulimit -v`, if that is less.

    Args:
        device: cuda or cpu.
        root: where `proc` and `sys` are.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    rooms = [*_system_room(root), *_group_rooms(root)] or [os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages = int(_text(root / "proc/self/statm").partition(" ")[0] or 0)
        rooms.append(limit - pages * resource.getpagesize())
    return max(0, min(rooms))


def room_of_one_process(device: torch.device, dist_env: DistEnv) -> int:
    """`available_memory`, of which each process of a machine has its share unless it has its own device."""
    return available_memory(device) // (1 if device.type == "cuda" else dist_env.local_world_size)


def largest_that_fits(config: Config, room: int, *, device_type: str, styles: int = 1) -> tuple[int, int] | None:
    """The largest `train.batch_size` for which there is memory; failing that, of a single image the largest size.

    Args:
        config: as for `estimate`.
        room: bytes.
        device_type: `cuda` or `cpu`.
        styles: as for `estimate`.

    Returns:
        Batch size, at most that of `config`, and image size: that of `config`, or less than that, a multiple of 16,
        where not even a single image fits. None where none of any size does.
    """

    def of(batch_size: int, side: int) -> Estimate:
        return estimate(_resized(config, batch_size, side), device_type=device_type, styles=styles)

    side, asked = config.data.image_size, config.train.batch_size
    single = of(1, side)
    if needed_memory(single) <= room:
        # All that grows with the batch grows in proportion to it.
        per_image = needed_memory(of(2, side)) - needed_memory(single)
        return min(asked, 1 + (room - needed_memory(single)) // per_image), side
    if single.weights + RESERVE_BYTES > room:
        return None
    return _largest_image(lambda smaller: needed_memory(of(1, smaller)), side, room)


def _largest_image(need_of: Callable[[int], int], side: int, room: int) -> tuple[int, int] | None:
    sizes = range(SIZE_STEP, side, SIZE_STEP)
    low, high = 0, len(sizes)  # sizes[:low] fit, sizes[high:] do not
    fits = False
    while low < high:
        middle = (low + high) // 2
        try:
            does = need_of(sizes[middle]) <= room
        except UserError:
            # Too small an image for a layer of the loss: what fits, if anything does, is larger.
            low = middle + 1
            continue
        fits |= does
        low, high = (middle + 1, high) if does else (low, middle)
    return (1, sizes[low - 1]) if fits else None


@contextlib.contextmanager
def explained_memory_errors(
    config: Config, device: torch.device, dist_env: DistEnv = ALONE, *, styles: int = 1
) -> Iterator[None]:
    """Turn a lack of memory into an error that says what would fit.

    Args:
        config: resolved: not `auto`.
        device: where it runs.
        dist_env: the processes that share the run.
        styles: that are trained together.

    Raises:
        DeviceError: instead of what PyTorch or Python raise.
    """
    room = room_of_one_process(device, dist_env)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        # What the failed step holds is still held by its frames, and to explain takes some memory, too.
        traceback.clear_frames(error.__traceback__)
        # On a CPU the 16-bit types take more memory, not less.
        in_fp32 = config.train.precision == "fp32" and device.type == "cuda"
        other = ", or use --precision bf16" if in_fp32 else ""
        if capture_unsupported_reason(config.train, device, processes=dist_env.world_size) is None:
            other += ", or --set train.capture=off, which frees a step's memory between steps"
        raise DeviceError(
            f"out of memory with train.batch_size = {config.train.batch_size} at data.image_size = "
            f"{config.data.image_size}; {_advice(config, room, device, dist_env, styles)}{other}"
        ) from error


def describe_shortage(
    config: Config, need: Estimate, room: int, *, device_type: str, processes: int = 1, styles: int = 1
) -> str | None:
    """What to do where a run of `config`, which needs `need`, should not fit into `room` bytes; None where it should.

    Args:
        config: as for `estimate`; with one process's share of the batch.
        need: of `config`.
        room: bytes that are there for one process.
        device_type: `cuda` or `cpu`.
        processes: that share a batch.
        styles: that are trained together.
    """
    if needed_memory(need) <= room:
        return None
    each = "" if processes == 1 else f", in each of {processes} processes"
    wants = (
        f"it needs about {byte_count(needed_memory(need))}, reserve included, and {byte_count(room)} are there{each}"
    )
    match largest_that_fits(config, room, device_type=device_type, styles=styles):
        case (batch_size, side) if side == config.data.image_size:
            return f"{wants}: set train.batch_size = {batch_size * processes}, the largest that should fit"
        case (_, side):
            return (
                f"{wants}: not even train.batch_size = {processes} should fit; with it set data.image_size = {side}, "
                "the largest that should"
            )
        case _:
            return f"{wants}: no train.batch_size or data.image_size should fit; use a device with more memory"


def _advice(config: Config, room: int, device: torch.device, dist_env: DistEnv, styles: int) -> str:
    processes, own = dist_env.world_size, local_config(config, dist_env)
    try:
        need = estimate(own, device_type=device.type, styles=styles)
        shortage = describe_shortage(own, need, room, device_type=device.type, processes=processes, styles=styles)
    except (RuntimeError, MemoryError, UserError):
        return "lower one of them"
    if shortage is not None:
        return shortage
    batch_size, side = config.train.batch_size, config.data.image_size
    half = batch_size // 2 // processes * processes
    fix = f"train.batch_size = {half}" if half else f"a data.image_size below {side}"
    return (
        f"it needs about {byte_count(needed_memory(need))}, reserve included, and {byte_count(room)} were there when "
        f"the run began, so something else has taken memory since: free it, or set {fix}"
    )


def _resized(config: Config, batch_size: int, side: int) -> Config:
    train = config.train.model_copy(update={"batch_size": batch_size})
    return config.model_copy(update={"train": train, "data": config.data.model_copy(update={"image_size": side})})


def _system_room(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _group_rooms(root: Path) -> Iterator[int]:
    """What is left of the memory limit of this process's control group, and of those around it; version 1 and 2."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = root / "sys/fs/cgroup/memory"
        else:
            continue
        # In a container the path may be that of the host, of which only the top is there.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            yield from _group_room(folder, *names)
            if folder == top:
                break


def _group_room(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> Iterator[int]:
    limit, usage = _text(folder / limit_name).strip(), _text(folder / usage_name).strip()
    if limit.isdecimal() and usage.isdecimal():
        counts = dict(line.split()[:2] for line in _text(folder / "memory.stat").splitlines())
        # Pages of files that nobody has looked at lately are given up before anything fails.
        yield int(limit) - int(usage) + int(counts.get(cache_name, 0))


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
