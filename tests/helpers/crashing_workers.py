"""What stands for `pillow._read_crops` in worker processes that die; light, because each new worker imports it."""

import os
import signal

import numpy as np

from fastnst.data.loaders import pillow

DEADLY = "image_05.webp"
_read_crops = pillow._read_crops


def read_or_die(jobs: list[pillow.Job], size: int) -> pillow.Part:
    """One image ends whoever decodes it, as a fault in a decoder would."""
    if any(path.endswith(DEADLY) for _, path, *_ in jobs):
        os.kill(os.getpid(), signal.SIGKILL)
    return _read_crops(jobs, size)


def only_die(_jobs: list[pillow.Job], _size: int) -> pillow.Part:
    """As where there is no memory for even one process."""
    os.kill(os.getpid(), signal.SIGKILL)
    return np.empty(0, np.uint8), []
