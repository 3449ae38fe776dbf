"""This process's place among those of a run, as `torchrun` sets it in the environment; imports no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType

from fastnst.errors import UserError

if TYPE_CHECKING:
    from fastnst.config import Config

LocalConfig = NewType("LocalConfig", "Config")
"""A configuration with one process's share: `train.batch_size` is per process, `data.workers` per process."""

_ADVICE = "start several processes by: torchrun --nproc-per-node N -m fastnst train …"


@dataclass(frozen=True)
class DistEnv:
    """Rank and world size of this process, over all machines and on this one."""

    rank: int = 0
    """Rank 0 prints and writes."""
    world_size: int = 1
    local_rank: int = 0
    """Counted on this machine; also the number of its GPU."""
    local_world_size: int = 1
    """Processes on this machine."""

    @classmethod
    def from_environ(cls, environment: Mapping[str, str] = os.environ) -> "DistEnv":
        """Read the variables that torchrun sets; a single process where there are none.

        Raises:
            UserError: the variables contradict one another, or some are missing.
        """
        world_size = _number(environment, "WORLD_SIZE", 1)
        if world_size == 1:
            return DistEnv()
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if missing:
            raise UserError(f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set; unset it, or {_ADVICE}")
        rank = _number(environment, "RANK", 0)
        local_rank = _number(environment, "LOCAL_RANK", rank)
        local_world_size = _number(environment, "LOCAL_WORLD_SIZE", world_size)
        if not 0 <= rank < world_size:
            raise UserError(f"RANK is {rank} and WORLD_SIZE {world_size}; {_ADVICE}")
        if not 0 <= local_rank < local_world_size:
            raise UserError(f"LOCAL_RANK is {local_rank} and LOCAL_WORLD_SIZE {local_world_size}; {_ADVICE}")
        return DistEnv(rank, world_size, local_rank, local_world_size)


def check_divisible(config: "Config", dist_env: DistEnv) -> None:
    """Refuse a batch that does not divide evenly, and batch norm over several processes.

    Raises:
        UserError: naming the batch size, the number of processes and the fix.
    """
    batch_size, processes = config.train.batch_size, dist_env.world_size
    if batch_size % processes:
        nearest = batch_size + processes - batch_size % processes
        raise UserError(
            f"train.batch_size {batch_size} cannot be shared evenly by {processes} processes; choose a multiple of "
            f"{processes}, for example --set train.batch_size={nearest}"
        )
    if processes > 1 and config.model.norm == "batch":
        raise UserError(
            f"model.norm is 'batch', whose statistics are those of a whole batch, and {processes} processes see "
            f"{batch_size // processes} of its {batch_size} images each; use --set model.norm=instance, or train in "
            "one process"
        )


def local_config(config: "Config", dist_env: DistEnv) -> LocalConfig:
    """Return the configuration with this process's share of the batch and, unless set, of the workers."""
    train = config.train.model_copy(update={"batch_size": max(1, config.train.batch_size // dist_env.world_size)})
    data = config.data
    if data.workers is None and dist_env.local_world_size > 1:
        from fastnst.data.loaders import MAX_WORKERS

        cores = len(os.sched_getaffinity(0)) // dist_env.local_world_size
        data = data.model_copy(update={"workers": max(1, min(MAX_WORKERS, cores))})
    return LocalConfig(config.model_copy(update={"train": train, "data": data}))


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or (name.endswith("WORLD_SIZE") and not int(text)):
        raise UserError(f"the environment variable {name} is {text!r}, which is no such number; unset it, or {_ADVICE}")
    return int(text)
