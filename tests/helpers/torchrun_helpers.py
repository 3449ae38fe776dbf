"""Several processes that share a run, as torchrun starts them, forked instead of started: see `fork_server.py`."""

from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from helpers.crash_points import Case
from helpers.fork_server import Ended, ForkServer


def environment(rank: int, world_size: int, port: int, *, agent: bool = True) -> dict[str, str]:
    """What torchrun tells a process; its agent keeps the store in which they meet, otherwise rank 0 does."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in (numbers | meeting | {"TORCHELASTIC_USE_AGENT_STORE": agent}).items()}


def run_ranks(
    server: ForkServer,
    argv: tuple[str, ...],
    folder: Path,
    *,
    world_size: int = 2,
    agent: bool = True,
    **of_ranks: dict[int, Any],
) -> list[Ended]:
    """Run a command line in several processes; returns how each ended, by rank.

    Args:
        server: what forks them.
        argv: the same for all.
        folder: receives a folder for each.
        world_size: how many.
        agent: whether the store in which they meet outlives them all.
        of_ranks: fields of `Case`, by rank.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    if not agent:
        del store  # its port is free now, and most likely still is when rank 0 takes it
    cases = [
        Case(
            argv,
            str(folder / f"rank{rank}"),
            environment=tuple(environment(rank, world_size, port, agent=agent).items()),
            **{name: values[rank] for name, values in of_ranks.items() if rank in values},
        )
        for rank in range(world_size)
    ]
    return server.run_together(cases)


def codes(ended: list[Ended]) -> list[int]:
    """Exit codes by rank; none has printed a traceback."""
    for each in ended:
        assert "Traceback" not in each.printed, each.printed
    return [each.code for each in ended]


def messages(ended: list[Ended]) -> list[tuple[int, str]]:
    """Rank and text of each error message."""
    return [
        (rank, line.removeprefix("fastnst: "))
        for rank, each in enumerate(ended)
        for line in each.printed.splitlines()
        if line.startswith("fastnst: ")
    ]
