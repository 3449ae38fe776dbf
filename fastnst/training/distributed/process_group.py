"""The processes that share a run: `torchrun --nproc-per-node N -m fastnst train …`.

Each process has its own device, reads its share of every batch, and holds the same weights as the others.
DistributedDataParallel averages the gradients over NCCL (on CPUs over gloo) while the backward still runs. Everything
else that ranks agree on, once or twice a step, is a few numbers in a gloo group of CPU tensors, for which no GPU waits.
Only rank 0 writes and prints. A signal, bad image or NaN on any rank stops every rank.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastnst.errors import DataError, DeviceError, UserError
from fastnst.progress import silenced
from fastnst.training.distributed.environment import DistEnv
from fastnst.training.distributed.heartbeat import SILENCE, Heartbeat
from fastnst.training.signals import StopRequest

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)
"""How long processes wait for one another at their start."""
COLLECTIVE_TIMEOUT = timedelta(days=7)
"""How long one waits while another works: checks a million images, say. Its heartbeat shows that it is alive."""
BUCKET_MB = 1
"""DistributedDataParallel's bucket; with its default of 25 a whole net waits for its last gradient."""


class _EndedElsewhere(BaseException):
    """Another process ended the run; no handler may take it for a failure of this one."""


class ProcessGroup:
    """The processes of a run, seen from one of them; of this class itself, a single process.

    All ranks make the same calls in the same order.
    """

    def __init__(self, dist_env: DistEnv) -> None:
        self.dist_env = dist_env

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process prints and writes."""
        return self.dist_env.rank == 0

    def data_parallel(self, net: nn.Module, device: torch.device, image_size: int) -> nn.Module:  # noqa: ARG002
        """Wrap `net` so that its gradients are averaged over all ranks; its parameters become those of rank 0.

        Args:
            net: on `device`.
            device: of this process.
            image_size: side of the images.
        """
        return net

    def all_reduce_max(self, *values: int) -> list[int]:
        """Return the largest of each value over all ranks."""
        return list(values)

    def all_gather_text(self, text: str) -> list[str]:
        """Return each rank's text; an empty list if all are empty."""
        return [text] if text else []

    def all_reduce_mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the mean of each value over all ranks; all have the same keys."""
        return dict(values)

    def broadcast(self, content: bytes) -> bytes:
        """Return rank 0's bytes."""
        return content

    def local_rank_zero_first(self) -> contextlib.AbstractContextManager[None]:
        """Run this block in one process of each machine first, so that the others find its caches."""
        return contextlib.nullcontext()

    def exit_unless(self, rank: int = 0) -> None:
        """Call before raising an error on all ranks: returns on `rank` only, which raises it; ends the others."""


class Distributed(ProcessGroup):
    """One of several processes, which meet at torchrun's rendezvous.

    Args:
        dist_env: rank and world size.
        resume_hint: returns what is saved and how to go on, for the message when another process is gone.
    """

    def __init__(self, dist_env: DistEnv, resume_hint: Callable[[], str]) -> None:
        super().__init__(dist_env)
        self._resume_hint = resume_hint
        try:
            store, _, _ = next(
                dist.rendezvous("env://", dist_env.rank, dist_env.world_size, timeout=RENDEZVOUS_TIMEOUT)
            )
            dist.init_process_group(
                "gloo", store=store, rank=dist_env.rank, world_size=dist_env.world_size, timeout=COLLECTIVE_TIMEOUT
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
        self._nccl: dist.ProcessGroup | None = None
        self._names = self._gather(f"process {os.getpid()} on {os.uname().nodename}")
        self._heartbeat = Heartbeat(
            dist_env.rank,
            dist_env.world_size,
            dist.new_group(backend="gloo", timeout=SILENCE),
            dist.PrefixStore("fastnst", store),
            self._failure_message,
        )

    def data_parallel(self, net: nn.Module, device: torch.device, image_size: int) -> nn.Module:
        # Its own group, so that gradients and the numbers of the default group do not wait for each other.
        if self._gradients is None and device.type == "cuda":
            self._gradients = self._nccl = dist.new_group(backend="nccl", timeout=COLLECTIVE_TIMEOUT, device_id=device)
        elif self._gradients is None:
            self._gradients = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        wrapped = DistributedDataParallel(
            net, process_group=self._gradients, bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True
        )
        # DDP reorders its buckets after the first backward, and with them the sums over three or more processes. Do it
        # before the first step: a resumed run must sum like the uninterrupted one.
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
        """Wait for the others at the end of a successful run."""
        assert self._heartbeat is not None
        self._heartbeat.finish(self._check)
        dist.destroy_process_group()

    def end(self, error: BaseException, stop: StopRequest) -> BaseException:
        """Return what to raise in place of `error`, which ended this process."""
        assert self._heartbeat is not None
        # The others are about to end, too, and torchrun sends signals to the slower ones.
        stop.disregard()
        # A broken connection is often the first sign that another process is gone.
        is_broken_connection = isinstance(error, RuntimeError) and not isinstance(error, UserError)
        end = self._heartbeat.wait_for_end(3.0 if is_broken_connection else 0.0)
        if end is None:
            code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
            return error if self._heartbeat.announce(code) else SystemExit(self._code(code))
        self._heartbeat.leave()
        if self._nccl is not None:
            # The GPU may wait for gradients that never come, and this process for the GPU.
            with contextlib.suppress(RuntimeError):
                self._nccl.abort()
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
        """Wait for `work`, while handling signals and noticing that another process is gone."""
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
        return (
            f"rank {rank} of {self.dist_env.world_size} ({self._names[rank]}) ended without a word or has not been "
            f"heard of for {SILENCE.seconds // 60} minutes: killed, perhaps for lack of memory. Training stopped; "
            f"{self._resume_hint()}",
            DeviceError.exit_code,
        )


@contextlib.contextmanager
def open_process_group(dist_env: DistEnv, stop: StopRequest, resume_hint: Callable[[], str]) -> Iterator[ProcessGroup]:
    """Join the processes of a run; if one of them fails, all end.

    The first process that fails raises its error. The others raise SystemExit with the same exit code, so that the user
    sees the message once.

    Args:
        dist_env: rank and world size.
        stop: signals that this process has received.
        resume_hint: returns what is saved and how to go on, for the message when another process is gone.

    Raises:
        UserError: the processes do not find one another.
        DeviceError: another process was killed.
    """
    if dist_env.world_size == 1:
        yield ProcessGroup(dist_env)
        return
    with contextlib.ExitStack() as quiet:
        if dist_env.rank:
            quiet.enter_context(silenced())
        group = Distributed(dist_env, resume_hint)
        try:
            yield group
            group.finish()
        except BaseException as error:
            instead = group.end(error, stop)
            if instead is error:
                raise
            raise instead from error


def choose_device(name: str, dist_env: DistEnv) -> None:
    """Make this process's GPU the current one, if it uses one.

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


def check_equal(group: ProcessGroup, values: Mapping[str, Any]) -> None:
    """Refuse ranks with different values: environment variables or folders may differ between machines.

    Args:
        group: all its ranks call this.
        values: configuration, fingerprints, …: JSON values by name, or dictionaries of them.

    Raises:
        DataError: naming the first key that differs, and both values.
    """
    gathered = [json.loads(text) for text in group.all_gather_text(json.dumps(_flat(values)))]
    for rank, other in enumerate(gathered):
        for key, value in gathered[0].items():
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
