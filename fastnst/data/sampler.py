"""Draw the images, crops and flips of every step, as a pure function of a few numbers.

A run is one long sequence of positions: epoch after epoch, each a fresh permutation of all images, cut into batches
regardless of epoch ends. Each position also has a crop and a flip. All are computed from the raw 64-bit words of the
counter-based Philox generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Any position costs
the same to compute, so a run resumes anywhere; and unlike NumPy's distributions, Philox's output never changes, so a
run resumed years later reads the same images.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from fastnst.errors import UserError

Fit = Literal["random_crop", "center_crop", "squash"]

# The second word of Philox's key, so that the two streams of one seed are independent.
_PERMUTATION, _POSITION = 1, 2
_WORDS_PER_COUNTER = 4


@dataclass(frozen=True)
class SampleBatch:
    """What one rank reads in one step."""

    indices: np.ndarray
    """int64 `[B]`: indices into the manifest's list of images."""
    crop: np.ndarray
    """float32 `[B, 2]` in [0, 1): offset of the crop along x and y, as a fraction of the free range."""
    flip: np.ndarray
    """bool `[B]`: mirror left to right."""


class Sampler:
    """Draws the image indices, crops and flips of every step of a run.

    Ranks take consecutive slices of a step's batch, so the images of a step do not depend on the number of processes.

    Args:
        seed: any number from 0 to 2⁶⁴ - 1.
        num_images: images in the manifest.
        batch_size: images per step, summed over ranks; may exceed `num_images`.
        steps: length of the run.
        world_size: number of ranks; divides `batch_size`.
        fit: how an image becomes square; only `random_crop` draws crops, the others use the center.
        flip: mirror each image with probability 1/2.

    Raises:
        UserError: no images, or a batch size that `world_size` does not divide.
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
        """Images per step and rank."""
        return self.batch_size // self.world_size

    def batch(self, step: int, rank: int = 0) -> SampleBatch:
        """Return the samples of `rank` in `step` (0 … steps - 1)."""
        if not 0 <= step < self.steps or not 0 <= rank < self.world_size:
            raise IndexError(f"step {step}, rank {rank} of a run of {self.steps} steps on {self.world_size} ranks")
        size = self.local_batch_size
        first = step * self.batch_size + rank * size
        positions = np.arange(first, first + size, dtype=np.int64)
        indices = np.empty(size, dtype=np.int64)
        epochs = positions // self.num_images
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            of_epoch = epochs == epoch
            offsets = positions[of_epoch] % self.num_images
            indices[of_epoch] = _permutation(self.seed, epoch, self.num_images)[offsets]
        words = _philox_words(self.seed, _POSITION, first, size)
        if self.fit == "random_crop":
            # A float32 holds 24 bits exactly, so no fraction rounds up to 1.
            crop = ((words[:, :2] >> np.uint64(40)).astype(np.float32)) / np.float32(2**24)
        else:
            crop = np.full((size, 2), 0.5, dtype=np.float32)
        flip = (words[:, 2] >> np.uint64(63)).astype(bool) & self.flip
        return SampleBatch(indices, crop, flip)


# A batch spans one or two epochs. A batch larger than the folder spans more, but then permutations are cheap.
@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return a uniform permutation: the argsort of random 64-bit keys."""
    counts = -(-length // _WORDS_PER_COUNTER)
    keys = _philox_words(seed, _PERMUTATION, epoch << 64, counts).reshape(-1)[:length]
    permutation = np.argsort(keys, kind="stable")
    permutation.setflags(write=False)
    return permutation


def _philox_words(seed: int, stream: int, first: int, counts: int) -> np.ndarray:
    """Return Philox's output for the counters `first` … `first + counts - 1`, uint64 `[counts, 4]`."""
    counter = np.array([first >> shift & (2**64 - 1) for shift in (0, 64, 128, 192)], dtype=np.uint64)
    generator = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=counter)
    return generator.random_raw(counts * _WORDS_PER_COUNTER).reshape(counts, _WORDS_PER_COUNTER)
