"""What a whole run reads, front to back, as a pure function of a few numbers.

A run is one long line of places: epoch after epoch, each a fresh permutation of all images, cut into batches
wherever they end. A place also has its crop and its flip. Everything is computed from the raw 64-bit words of the
counter-based Philox generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose output is
fixed for ever, unlike that of NumPy's distributions; so any place can be looked up without walking to it, and a run
resumed years later goes on as it would have.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from fastnst.errors import UserError

Fit = Literal["random_crop", "center_crop", "squash"]

# The second word of Philox's key keeps the two uses of one seed apart.
_PERMUTATION, _PLACE = 1, 2
_WORDS_PER_COUNT = 4


@dataclass(frozen=True)
class SampleBatch:
    """One batch of one rank."""

    indices: np.ndarray
    """int64 `[B]`: positions in the manifest's list of images."""
    crop: np.ndarray
    """float32 `[B, 2]` in [0, 1): where the crop lies along the x and y axis, as a fraction of what is left over."""
    flip: np.ndarray
    """bool `[B]`: mirrored left to right."""


class Sampler:
    """Which image, crop and flip stands at each place of a run.

    The batch of a step is shared among the ranks in rank order, so the steps of a run, and hence its outcome up to the
    summation order of gradients, do not depend on the number of processes.

    Args:
        seed: any number from 0 to 2⁶⁴ - 1.
        num_images: images in the manifest.
        batch_size: images of one step, all ranks together; may exceed `num_images`.
        steps: length of the run.
        world_size: processes that share each step; divides `batch_size`.
        fit: how an image becomes square; only `random_crop` draws crops, the others take the middle.
        flip: mirror each image with probability one half.

    Raises:
        UserError: no images, or a batch that cannot be shared evenly.
    """

    def __init__(
        self,
        seed: int,
        num_images: int,
        batch_size: int,
        steps: int,
        *,
        world_size: int = 1,
        fit: Fit = "random_crop",
        flip: bool = True,
    ) -> None:
        if not 0 <= seed < 2**64:
            raise UserError(f"seed is {seed}; choose one from 0 to 2**64 - 1")
        if num_images < 1 or steps < 0:
            raise UserError(f"a run of {steps} steps over {num_images} images reads nothing; give at least one image")
        if world_size < 1 or batch_size < 1 or batch_size % world_size:
            raise UserError(
                f"train.batch_size {batch_size} cannot be shared evenly by {world_size} processes; "
                f"choose a multiple of {max(world_size, 1)}"
            )
        self.seed = seed
        self.num_images = num_images
        self.batch_size = batch_size
        self.steps = steps
        self.world_size = world_size
        self.fit: Fit = fit
        self.flip = flip

    @property
    def local_batch_size(self) -> int:
        """Images of one step on one rank."""
        return self.batch_size // self.world_size

    def batch(self, step: int, rank: int = 0) -> SampleBatch:
        """What `rank` reads in `step` (0 … steps - 1)."""
        if not 0 <= step < self.steps or not 0 <= rank < self.world_size:
            raise IndexError(f"step {step}, rank {rank} of a run of {self.steps} steps on {self.world_size} ranks")
        size = self.local_batch_size
        first = step * self.batch_size + rank * size
        places = np.arange(first, first + size, dtype=np.int64)
        indices = np.empty(size, dtype=np.int64)
        epochs = places // self.num_images
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            of_epoch = epochs == epoch
            indices[of_epoch] = _permutation(self.seed, epoch, self.num_images)[places[of_epoch] % self.num_images]
        words = _words(self.seed, _PLACE, first, size)
        if self.fit == "random_crop":
            # 24 bits are what a float32 holds exactly, so that no fraction rounds up to 1.
            crop = ((words[:, :2] >> np.uint64(40)).astype(np.float32)) / np.float32(2**24)
        else:
            crop = np.full((size, 2), 0.5, dtype=np.float32)
        flip = (words[:, 2] >> np.uint64(63)).astype(bool) & self.flip
        return SampleBatch(indices, crop, flip)


# A batch lies in one epoch or spans two; batches larger than the folder span more, but then the folder is small.
@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """A uniform permutation: the order of random 64-bit keys."""
    counts = -(-length // _WORDS_PER_COUNT)
    keys = _words(seed, _PERMUTATION, epoch << 64, counts).reshape(-1)[:length]
    permutation = np.argsort(keys, kind="stable")
    permutation.setflags(write=False)
    return permutation


def _words(seed: int, use: int, first: int, counts: int) -> np.ndarray:
    """uint64 `[counts, 4]`: Philox's output for the counters `first`, `first` + 1, …"""
    generator = np.random.Philox(key=np.array([seed, use], dtype=np.uint64), counter=_as_counter(first))
    return generator.random_raw(counts * _WORDS_PER_COUNT).reshape(counts, _WORDS_PER_COUNT)


def _as_counter(value: int) -> np.ndarray:
    mask = 2**64 - 1
    return np.array([value >> shift & mask for shift in (0, 64, 128, 192)], dtype=np.uint64)
