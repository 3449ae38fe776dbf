"""Several processes that share a run, as torchrun starts them, forked instead of started: see `fork_server.py`."""

from pathlib import Path
from typing import Any

from crash_points import Case
from fork_server import Ended, ForkServer
from torch.distributed import TCPStore


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process; it also keeps the store in which the processes meet, whatever becomes of them."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    return {name: str(value) for name, value in (numbers | meeting | agent).items()}


def run_ranks(
    server: ForkServer, argv: tuple[str, ...], folder: Path, *, world_size: int = 2, **of_ranks: dict[int, Any]
) -> list[Ended]:
    """Run a command line in several processes; returns how each ended, by rank.

    Args:
        server: what forks them.
        argv: the same for all.
        folder: receives a folder for each.
        world_size: how many.
        of_ranks: fields of `Case`, by rank.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    cases = [
        Case(
            argv,
            str(folder / f"rank{rank}"),
            environment=tuple(environment(rank, world_size, store.port).items()),
            **{name: values[rank] for name, values in of_ranks.items() if rank in values},
        )
        for rank in range(world_size)
    ]
    return server.run_together(cases)
