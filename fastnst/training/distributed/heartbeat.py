"""Signs of life among the processes of a run: one that is gone ends the others, whatever they wait for.

A thread of each process sends rank 0 a sign every half second and receives how all are; the operating system closes
the connections of a process that is killed, so that this is noticed at once. One that is only silent, because its
machine is, counts as gone after `SILENCE`.

A process that ends for a reason says so first in the store that brought the processes together. The first to do so,
or the first to find that another is gone without a word, tells the user; the others only end.
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
"""How long a process that learns of the end may take to come to its own, before it is cut short."""
_GOING, _DONE, _LOST, _LEFT = range(4)


@dataclass(frozen=True)
class End:
    """How the run ended, early."""

    rank: int
    """Whose end it was."""
    exit_code: int
    message: str
    """For the user, from this process; empty where another tells."""


class Heartbeat:
    """This process's sign of life, and what it knows of the others.

    Args:
        rank: of this process.
        world_size: how many there are.
        group: a gloo group for this alone, with `SILENCE` as its timeout.
        store: where ends are announced.
        failure_message: rank that is gone without a word → what to tell the user, and the exit code.
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
        self._last_words: list[dist.Work | None] = []
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def end(self) -> End | None:
        """How another process ended the run, if one did."""
        return self._end

    def wait_for_end(self, seconds: float) -> End | None:
        """The same, after waiting for it."""
        deadline = time.monotonic() + seconds
        while self._end is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._end

    def announce(self, exit_code: int) -> bool:
        """Tell the others that this process is about to end early.

        Returns:
            Whether the user should hear of it from this process: no other was first, or none can be asked.
        """
        self._leaving.set()
        with self._decide:
            if self._end is not None:
                return bool(self._end.message)
            is_first = self._claim(exit_code)
            self._end = End(self._rank, exit_code, "told by its exception") if is_first else self._end
        if not is_first:
            return self.wait_for_end(5.0) is None
        # The store may be this process's, and goes with it.
        deadline = time.monotonic() + 3.0
        while time.monotonic() < deadline and self._heard() < len(self._states) - 1:
            time.sleep(0.02)
        return True

    def finish(self, check: Callable[[], None]) -> None:
        """Wait until all have finished; `check` is called again and again meanwhile."""
        self._own = _DONE
        while self._thread.is_alive():
            check()
            time.sleep(0.01)
        check()
        self._leaving.set()

    def leave(self) -> None:
        """This process is ending by itself: no need to cut it short."""
        self._leaving.set()

    def _run(self) -> None:
        while not self._exchange():
            time.sleep(PERIOD_S if self._own == _GOING else 0.01)
        if self._end is None:
            return
        self._take_leave()
        # What this process waits for may never come: a GPU waits for the gradients of one that is gone.
        if not self._leaving.wait(GRACE_S):
            if self._end.message:
                os.write(2, f"fastnst: {self._end.message}\n".encode())
            os._exit(self._end.exit_code)

    def _exchange(self) -> bool:
        """One sign from and to each; whether it was the last."""
        if self._rank:
            self._report()
        else:
            self._collect()
        if self._hear():
            return True
        lost = [rank for rank, state in enumerate(self._states.tolist()) if state == _LOST]
        if not lost:
            return bool((self._states == _DONE).all())
        with self._decide:
            if self._end is None:
                self._end = self._bury(lost[0])
        return True

    def _report(self) -> None:
        try:
            # Not `send`, which returns when it is received: rank 0 may have left.
            sign = torch.tensor([self._own])
            sent = dist.isend(sign, 0, group=self._group)
            dist.recv(self._states, 0, group=self._group)
            assert sent is not None
            if self._states[0] != _LEFT:
                sent.wait()
        except RuntimeError:
            self._states[0] = _LOST

    def _collect(self) -> None:
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
                    # Those who have it already hear of it from the closed connection to this process.
                    self._states[rank] = _LOST

    def _take_leave(self) -> None:
        """Let nobody wait for this process's sign."""
        self._states[self._rank] = _LEFT
        others = range(1, len(self._states)) if self._rank == 0 else (0,)
        content = self._states if self._rank == 0 else self._states[self._rank : self._rank + 1]
        for rank in others:
            if self._states[rank] in (_GOING, _DONE):
                with contextlib.suppress(RuntimeError):
                    self._last_words.append(dist.isend(content, rank, group=self._group))

    def _hear(self) -> bool:
        """Whether an end was announced, which is taken down."""
        if self._store_is_lost:
            return False
        try:
            if not self._store.check(["end"]):
                return False
            said = json.loads(self._store.get("end"))
            with self._decide:
                if self._end is None:
                    self._end = End(int(said["rank"]), int(said["exit_code"]), "")
                    self._store.add("heard", 1)
        except RuntimeError:
            self._store_is_lost = True
            return False
        return True

    def _bury(self, rank: int) -> End:
        message, exit_code = self._failure_message(rank)
        try:
            is_first = self._claim(exit_code)
        except RuntimeError:
            is_first = True
        return End(rank, exit_code, message if is_first else "")

    def _claim(self, exit_code: int) -> bool:
        """Whether this process is the first to end; then the others can read of it."""
        try:
            if self._store.add("ends", 1) != 1:
                return False
            self._store.set("end", json.dumps({"rank": self._rank, "exit_code": exit_code}))
        except RuntimeError:
            # The store went with the process that held it, rank 0: the next one tells.
            return self._rank == min(1, len(self._states) - 1)
        return True

    def _heard(self) -> int:
        try:
            return self._store.add("heard", 0)
        except RuntimeError:
            return len(self._states)
