"""The processes that share a run: `torchrun --nproc-per-node N -m fastnst train …`.

Each process has a device of its own, reads its share of every batch, and holds the same weights as the others. What the
gradients need is PyTorch's: DistributedDataParallel averages them over NCCL (on CPUs gloo) while the backward still
runs. Whatever else has to be agreed on, once or twice a step, goes as a few numbers over a gloo group of CPU tensors,
for which no GPU has to wait. Rank 0 leads: it alone prints, and writes into the run directory.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastnst.errors import DataError, DeviceError, UserError
from fastnst.progress import silenced
from fastnst.training.distributed.environment import DistEnv
from fastnst.training.distributed.heartbeat import SILENCE, Heartbeat
from fastnst.training.run_dir.checkpoint import checkpoint_steps
from fastnst.training.signals import StopRequest

MEETING = timedelta(minutes=5)
"""How long processes wait for one another at their start."""
PATIENCE = timedelta(days=7)
"""How long one waits while another works: checks a million images, say. That it is alive is what its heartbeat says."""
BUCKET_MB = 1
"""Gradients that travel together: with DistributedDataParallel's own 25, a whole net waits for its last gradient."""


class _EndedElsewhere(BaseException):
    """Another process ended the run; nothing on the way out may take it for a failure of its own."""


class ProcessGroup(Protocol):
    """The processes of a run, as one of them sees it. All of them make the same calls in the same order."""

    dist_env: DistEnv

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process prints and writes."""
        return self.dist_env.rank == 0

    def data_parallel(self, net: nn.Module, device: torch.device, image_size: int, /) -> nn.Module:
        """What to call in place of `net`, so that its gradients are the mean over all processes.

        Args:
            net: on `device`; its parameters become those of rank 0 everywhere.
            device: this process's.
            image_size: side of the images.
        """

    def all_reduce_max(self, *values: int) -> list[int]:
        """The largest of each value, over all processes."""

    def all_gather_text(self, text: str) -> list[str]:
        """What each process has to say, by rank; empty if none has."""

    def all_reduce_mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean of each value, over all processes; the same keys everywhere."""

    def broadcast(self, content: bytes) -> bytes:
        """What rank 0 gives."""

    def local_rank_zero_first(self) -> contextlib.AbstractContextManager[None]:
        """One process of each machine is through this block before the others enter it, and find what it cached."""

    def exit_unless(self, rank: int = 0) -> None:
        """Before raising what ends all processes at the same time: returns in `rank`, and never in the others."""


class SingleProcess(ProcessGroup):
    """One process, which agrees with itself."""

    dist_env = DistEnv()

    def data_parallel(self, net: nn.Module, *_: object) -> nn.Module:
        return net

    def all_reduce_max(self, *values: int) -> list[int]:
        return list(values)

    def all_gather_text(self, text: str) -> list[str]:
        return [text] if text else []

    def all_reduce_mean(self, values: Mapping[str, float]) -> dict[str, float]:
        return dict(values)

    def broadcast(self, content: bytes) -> bytes:
        return content

    def local_rank_zero_first(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def exit_unless(self, _rank: int = 0) -> None:
        pass


class Distributed(ProcessGroup):
    """One of several processes, brought together by the environment's store."""

    def __init__(self, dist_env: DistEnv, runs: Sequence[Path]) -> None:
        self.dist_env = dist_env
        self._runs = runs
        try:
            store, _, _ = next(dist.rendezvous("env://", dist_env.rank, dist_env.world_size, timeout=MEETING))
            dist.init_process_group(
                "gloo", store=store, rank=dist_env.rank, world_size=dist_env.world_size, timeout=PATIENCE
            )
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = str(error).partition("\n")[0][:200]
            raise UserError(
                f"rank {dist_env.rank} of {dist_env.world_size} processes could not meet the others at {where} "
                f"({reason}); start them together, by torchrun, with the same --nnodes and --rdzv-endpoint on every "
                "machine"
            ) from error
        self._heartbeat: Heartbeat | None = None
        self._gradients: dist.ProcessGroup | None = None
        self._on_gpu: dist.ProcessGroup | None = None
        who = f"process {os.getpid()} on {os.uname().nodename}"
        self._who = self._gather(who)
        self._heartbeat = Heartbeat(
            dist_env.rank,
            dist_env.world_size,
            dist.new_group(backend="gloo", timeout=SILENCE),
            dist.PrefixStore("fastnst", store),
            self._failure_message,
        )

    def data_parallel(self, net: nn.Module, device: torch.device, image_size: int, /) -> nn.Module:
        # Apart from the group on which the processes agree, so that neither waits for the other.
        if self._gradients is None and device.type == "cuda":
            self._gradients = self._on_gpu = dist.new_group(backend="nccl", timeout=PATIENCE, device_id=device)
        elif self._gradients is None:
            self._gradients = dist.new_group(backend="gloo", timeout=PATIENCE)
        wrapped = DistributedDataParallel(
            net, process_group=self._gradients, bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True
        )
        # After its first backward DDP orders the buckets anew, and with them the sums of three or more processes. Now
        # rather than in the first step: a resumed run has to sum as the uninterrupted one does.
        example = torch.zeros(1, 3, image_size, image_size, dtype=next(net.parameters()).dtype, device=device)
        wrapped(example).sum().backward()
        net.zero_grad(set_to_none=True)
        return wrapped

    def all_reduce_max(self, *values: int) -> list[int]:
        agreed = torch.tensor(values, dtype=torch.int64)
        self._wait(dist.all_reduce(agreed, dist.ReduceOp.MAX, async_op=True))
        return agreed.tolist()

    def all_gather_text(self, text: str) -> list[str]:
        return self._gather(text) if self.all_reduce_max(bool(text))[0] else []

    def all_reduce_mean(self, values: Mapping[str, float]) -> dict[str, float]:
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        self._wait(dist.all_reduce(total, async_op=True))
        return dict(zip(values, (total / self.dist_env.world_size).tolist(), strict=True))

    def broadcast(self, content: bytes) -> bytes:
        size = torch.tensor([len(content)])
        self._wait(dist.broadcast(size, 0, async_op=True))
        shared = torch.frombuffer(
            bytearray(content if self.is_rank_zero else int(size)) or bytearray(1), dtype=torch.uint8
        )
        self._wait(dist.broadcast(shared, 0, async_op=True))
        return shared.numpy().tobytes()[: int(size)]

    @contextlib.contextmanager
    def local_rank_zero_first(self) -> Iterator[None]:
        if self.dist_env.local_rank:
            self.all_reduce_max(0)
            yield
        else:
            yield
            self.all_reduce_max(0)

    def exit_unless(self, rank: int = 0) -> None:
        if self.dist_env.rank == rank:
            return
        assert self._heartbeat is not None
        if self._heartbeat.wait_for_end(60.0) is None:
            raise RuntimeError(f"rank {rank} goes on where all should end")
        raise _EndedElsewhere

    def finish(self) -> None:
        """Wait for the others, at the end of a run that went well."""
        assert self._heartbeat is not None
        self._heartbeat.finish(self._check)
        dist.destroy_process_group()

    def end(self, error: BaseException, stop: StopRequest) -> BaseException:
        """What to raise instead of `error`, with which this process's share has ended early."""
        assert self._heartbeat is not None
        # The others are about to end, too, and torchrun will send signals to those that are a little slower.
        stop.disregard()
        # A broken connection is the way in which a process learns first that another is gone.
        is_broken_connection = isinstance(error, RuntimeError) and not isinstance(error, UserError)
        end = self._heartbeat.wait_for_end(3.0 if is_broken_connection else 0.0)
        if end is None:
            code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
            return error if self._heartbeat.announce(code) else SystemExit(self._code(code))
        self._heartbeat.leave()
        if self._on_gpu is not None:
            # Its GPU may be waiting for gradients that never come, and the process for its GPU.
            with contextlib.suppress(RuntimeError):
                self._on_gpu.abort()
        return DeviceError(end.message) if end.message else SystemExit(end.exit_code)

    def _code(self, own: int) -> int:
        assert self._heartbeat is not None
        return self._heartbeat.end.exit_code if self._heartbeat.end else own

    def _gather(self, text: str) -> list[str]:
        content = text.encode()
        sizes = torch.zeros(self.dist_env.world_size, dtype=torch.int64)
        sizes[self.dist_env.rank] = len(content)
        self._wait(dist.all_reduce(sizes, async_op=True))
        longest = max(1, int(sizes.max()))
        own = torch.frombuffer(bytearray(content.ljust(longest, b"\0")), dtype=torch.uint8)
        all_of_them = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.dist_env.world_size)]
        self._wait(dist.all_gather(all_of_them, own, async_op=True))
        return [each.numpy().tobytes()[:size].decode() for each, size in zip(all_of_them, sizes.tolist(), strict=True)]

    def _wait(self, work: dist.Work | None) -> None:
        """Until `work` is done, open to signals, and to the news that another process is gone."""
        assert work is not None
        pause = 2e-5
        while not work.is_completed():
            self._check()
            time.sleep(pause)
            pause = min(1.5 * pause, 0.02)
        work.wait()

    def _check(self) -> None:
        if self._heartbeat is not None and self._heartbeat.end is not None:
            raise _EndedElsewhere

    def _failure_message(self, rank: int) -> tuple[str, int]:
        try:
            step = min(max(checkpoint_steps(run), default=0) for run in self._runs)
        except (OSError, DataError):
            step = 0
        kept = (
            f"step {step} is the last that is saved; go on by the same torchrun command with --resume"
            if step
            else "no step is saved; then start again"
        )
        return (
            f"rank {rank} of {self.dist_env.world_size} ({self._who[rank]}) ended without a word or has not been heard "
            f"of for {SILENCE.seconds // 60} minutes: killed, perhaps for lack of memory. Training stopped; {kept}",
            DeviceError.exit_code,
        )


@contextlib.contextmanager
def open_process_group(dist_env: DistEnv, runs: Sequence[Path], stop: StopRequest) -> Iterator[ProcessGroup]:
    """The processes of a run; where one of them fails, all end.

    An error is raised in the process that met it first. Where it ended the run of another one, that one raises
    SystemExit with the same exit code: the user hears of it once.

    Args:
        dist_env: how many they are.
        runs: the run directories that they share; what is saved there is told when one of them is gone.
        stop: signals that this process has received.

    Raises:
        UserError: the processes do not find one another.
        DeviceError: another process was killed.
    """
    if dist_env.world_size == 1:
        yield SingleProcess()
        return
    with contextlib.ExitStack() as quiet:
        if dist_env.rank:
            quiet.enter_context(silenced())
        group = Distributed(dist_env, runs)
        try:
            yield group
            group.finish()
        except BaseException as error:
            instead = group.end(error, stop)
            if instead is error:
                raise
            raise instead from error


def choose_device(name: str, dist_env: DistEnv) -> None:
    """Make this process's GPU the current one, if it is to use one.

    Raises:
        DeviceError: fewer GPUs than processes, or a PyTorch without NCCL.
    """
    if dist_env.world_size == 1 or name == "cpu" or not torch.cuda.is_available():
        return
    if dist_env.local_world_size > torch.cuda.device_count():
        raise DeviceError(
            f"{dist_env.local_world_size} processes on this machine share {torch.cuda.device_count()} GPUs, and each "
            f"needs its own; use torchrun --nproc-per-node {torch.cuda.device_count()}, or --device cpu"
        )
    if not (dist.is_available() and dist.is_nccl_available()):
        raise DeviceError(
            f"{dist_env.world_size} processes on GPUs need NCCL, and torch {torch.__version__} is built without it; "
            "install a CUDA build of PyTorch for Linux, train in one process, or use --device cpu"
        )
    torch.cuda.set_device(dist_env.local_rank)


def check_equal(group: ProcessGroup, what: Mapping[str, Any]) -> None:
    """Refuse processes that were given different things: options by the environment, folders on other machines.

    Args:
        group: all of them call this.
        what: configuration, fingerprints, …: JSON values by name, or dictionaries of them.

    Raises:
        DataError: naming the first that differs, and both values.
    """
    said = [json.loads(text) for text in group.all_gather_text(json.dumps(_flat(what)))]
    for rank, other in enumerate(said):
        for key, value in said[0].items():
            if other.get(key) != value:
                group.exit_unless()
                raise DataError(
                    f"rank 0 has {key} = {str(value)[:200]}, and rank {rank} has {str(other.get(key))[:200]}; give "
                    "all processes the same options, images, style and weights"
                )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
