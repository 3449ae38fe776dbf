"""Heartbeats between the processes of a run: if one is gone, the others end, whatever they wait for.

A thread of each process sends rank 0 a heartbeat every half second and receives the state of all ranks. The operating
system closes the connections of a killed process, so its end is noticed at once; a process on a silent machine counts
as gone after `SILENCE`.

A process that ends with an error announces that in the store of the rendezvous first. One process prints the message:
the first to announce an end, or the first to find another one gone without an announcement. The others only end.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

SILENCE = timedelta(minutes=5)
PERIOD_S = 0.5
GRACE_S = 10.0
"""How long a process may take to end by itself once it has learned that the run ends, before it is killed."""
_GOING, _DONE, _LOST, _LEFT = range(4)


@dataclass(frozen=True)
class End:
    """How the run ended early."""

    rank: int
    """Of the process that ended it."""
    exit_code: int
    message: str
    """For this process to print; empty if another one prints it."""


class Heartbeat:
    """Sends this process's heartbeat and watches those of the others.

    Args:
        rank: of this process.
        world_size: number of processes.
        group: a gloo group for heartbeats alone, with `SILENCE` as its timeout.
        store: where ends are announced.
        failure_message: rank that is gone without an announcement → message for the user, and exit code.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        group: dist.ProcessGroup,
        store: dist.Store,
        failure_message: Callable[[int], tuple[str, int]],
    ) -> None:
        self._rank, self._group, self._store, self._failure_message = rank, group, store, failure_message
        self._states = torch.zeros(world_size, dtype=torch.int64)
        self._own = _GOING
        self._leaving = threading.Event()
        self._decide = threading.Lock()
        self._end: End | None = None
        self._store_is_lost = False
        self._goodbyes: list[dist.Work | None] = []
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def end(self) -> End | None:
        """How the run ended, if it did."""
        return self._end

    def wait_for_end(self, seconds: float) -> End | None:
        """Return `end`, after waiting for it for at most so long."""
        deadline = time.monotonic() + seconds
        while self._end is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._end

    def announce(self, exit_code: int) -> bool:
        """Announce that this process is about to end early.

        Returns:
            Whether this process should print the message: no other was first, or none can be asked.
        """
        self._leaving.set()
        with self._decide:
            if self._end is not None:
                return bool(self._end.message)
            is_first = self._announce_first(exit_code)
            self._end = End(self._rank, exit_code, "printed with its exception") if is_first else self._end
        if not is_first:
            return self.wait_for_end(5.0) is None
        # The store may live in this process; let the others read it first.
        deadline = time.monotonic() + 3.0
        while time.monotonic() < deadline and self._num_informed() < len(self._states) - 1:
            time.sleep(0.02)
        return True

    def finish(self, check: Callable[[], None]) -> None:
        """Wait until all have finished, calling `check` again and again."""
        self._own = _DONE
        while self._thread.is_alive():
            check()
            time.sleep(0.01)
        check()
        self._leaving.set()

    def leave(self) -> None:
        """Note that this process is ending by itself and need not be killed."""
        self._leaving.set()

    def _run(self) -> None:
        while not self._exchange():
            time.sleep(PERIOD_S if self._own == _GOING else 0.01)
        if self._end is None:
            return
        self._send_goodbye()
        # The main thread may wait for ever: a GPU waits for gradients from a process that is gone.
        if not self._leaving.wait(GRACE_S):
            if self._end.message:
                os.write(2, f"fastnst: {self._end.message}\n".encode())
            os._exit(self._end.exit_code)

    def _exchange(self) -> bool:
        """Exchange one heartbeat with each; return whether it was the last."""
        if self._rank:
            self._send_own_state()
        else:
            self._gather_states()
        if self._read_announcement():
            return True
        lost = [rank for rank, state in enumerate(self._states.tolist()) if state == _LOST]
        if not lost:
            return bool((self._states == _DONE).all())
        with self._decide:
            if self._end is None:
                self._end = self._end_of_lost(lost[0])
        return True

    def _send_own_state(self) -> None:
        try:
            # Not `send`, which blocks until it is received: rank 0 may have left.
            state = torch.tensor([self._own])
            sent = dist.isend(state, 0, group=self._group)
            dist.recv(self._states, 0, group=self._group)
            assert sent is not None
            if self._states[0] != _LEFT:
                sent.wait()
        except RuntimeError:
            self._states[0] = _LOST

    def _gather_states(self) -> None:
        self._states[0] = self._own
        for rank in range(1, len(self._states)):
            try:
                dist.recv(self._states[rank : rank + 1], rank, group=self._group)
            except RuntimeError:
                self._states[rank] = _LOST
        for rank in range(1, len(self._states)):
            if self._states[rank] in (_GOING, _DONE):
                try:
                    dist.send(self._states, rank, group=self._group)
                except RuntimeError:
                    # Ranks that have the states already notice the closed connection to this process.
                    self._states[rank] = _LOST

    def _send_goodbye(self) -> None:
        """Let no other process wait for this one's heartbeat."""
        self._states[self._rank] = _LEFT
        others = range(1, len(self._states)) if self._rank == 0 else (0,)
        content = self._states if self._rank == 0 else self._states[self._rank : self._rank + 1]
        for rank in others:
            if self._states[rank] in (_GOING, _DONE):
                with contextlib.suppress(RuntimeError):
                    self._goodbyes.append(dist.isend(content, rank, group=self._group))

    def _read_announcement(self) -> bool:
        """Return whether an end was announced; keep it in `end`."""
        if self._store_is_lost:
            return False
        try:
            if not self._store.check(["end"]):
                return False
            announced = json.loads(self._store.get("end"))
            with self._decide:
                if self._end is None:
                    self._end = End(int(announced["rank"]), int(announced["exit_code"]), "")
                    self._store.add("heard", 1)
        except RuntimeError:
            self._store_is_lost = True
            return False
        return True

    def _end_of_lost(self, rank: int) -> End:
        message, exit_code = self._failure_message(rank)
        try:
            is_first = self._announce_first(exit_code)
        except RuntimeError:
            is_first = True
        return End(rank, exit_code, message if is_first else "")

    def _announce_first(self, exit_code: int) -> bool:
        """Announce an end; return whether this process was the first to do so."""
        try:
            if self._store.add("ends", 1) != 1:
                return False
            self._store.set("end", json.dumps({"rank": self._rank, "exit_code": exit_code}))
        except RuntimeError:
            # The store ended with its process, rank 0: rank 1 prints the message.
            return self._rank == min(1, len(self._states) - 1)
        return True

    def _num_informed(self) -> int:
        try:
            return int(self._store.add("heard", 0))
        except RuntimeError:
            return len(self._states)
