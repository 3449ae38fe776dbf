"""Keep other processes busy beside a measurement, as on a machine that people share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Ends by itself, too, when whoever started it was killed.
_SPIN = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    sum(range(100_000))"


@contextmanager
def busy(count: int) -> Iterator[list[int]]:
    """Run `count` processes that need a core each, with normal priority; yield their ids."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            running.append(subprocess.Popen([sys.executable, "-c", _SPIN, str(os.getpid())]))
        yield [process.pid for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
