"""Measure training speed."""

import contextlib
import time
from collections.abc import Iterator


class ThroughputMeter:
    """Measures images per second and the share of time spent waiting for images, between two logged steps.

    Samples and checkpoints are left out of both. The device is idle when a clock is read, since the loss was read.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._begin, self._steps = time.perf_counter(), 0
        self._waited = self._paused = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this block, which begins a step, as waiting for images."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time in this block out."""
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """Return scalars since the last reading."""
        now = time.perf_counter()
        elapsed = max(now - self._begin - self._paused, 1e-9)
        scalars = {
            "speed/images_per_second": self._steps * self._batch_size / elapsed,
            "speed/data_wait_percent": 100 * self._waited / elapsed,
        }
        self._begin, self._steps, self._waited, self._paused = now, 0, 0.0, 0.0
        return scalars
