"""Probes that answer, fail, hang and crash; the worker processes of `fastnst doctor` import them by name."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def answers() -> dict[str, int]:
    print("a library that talks")
    return {"process": os.getpid()}


def raises() -> None:
    raise RuntimeError("the cable\nis out")


def exits() -> None:
    sys.exit(3)


def is_no_json() -> object:
    return object()


def hangs() -> None:
    # The test looks for this process and its child, which must both be gone afterwards.
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["DOCTOR_TEST_FILE"]).write_text(f"{os.getpid()} {sleeper.pid}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves() -> None:
    os._exit(7)


def where_modules_come_from() -> list[str]:
    return sys.path
