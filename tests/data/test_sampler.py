"""The sampler: complete, uniform, the same from any step and for any number of processes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastnst.data.sampler import SampleBatch, Sampler
from fastnst.errors import UserError

seeds = st.integers(0, 2**64 - 1)
# Step 1 of Sampler(2024, 10, 5, 4); crops in units of 2⁻²⁴.
PINNED_INDICES = [2, 4, 3, 6, 8]
PINNED_CROPS = [[924373, 13795113], [15574153, 5354625], [5528740, 4205607], [6568691, 9477340], [3439766, 14851932]]
PINNED_FLIPS = [False, True, False, False, True]


def joined(batches: list[SampleBatch]) -> SampleBatch:
    return SampleBatch(
        *(np.concatenate([getattr(batch, name) for batch in batches]) for name in ("indices", "crop", "flip"))
    )


def assert_same(one: SampleBatch, other: SampleBatch) -> None:
    np.testing.assert_array_equal(one.indices, other.indices)
    np.testing.assert_array_equal(one.crop, other.crop)
    np.testing.assert_array_equal(one.flip, other.flip)


@given(seeds, st.integers(1, 60), st.integers(1, 70), st.integers(1, 12))
def test_sampler_epoch_holds_every_image_once(seed: int, num_images: int, batch_size: int, steps: int) -> None:
    sampler = Sampler(seed, num_images, batch_size, steps)
    indices = joined([sampler.batch(step) for step in range(steps)]).indices
    assert len(indices) == steps * batch_size
    for first in range(0, len(indices) - num_images + 1, num_images):
        assert sorted(indices[first : first + num_images]) == list(range(num_images))
    unfinished = indices[len(indices) - len(indices) % num_images :]
    assert len(set(unfinished.tolist())) == len(unfinished)


@given(seeds, st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.data())
def test_sampler_ranks_split_the_batch_of_one_process(
    seed: int, num_images: int, local: int, steps: int, world_size: int, data: st.DataObject
) -> None:
    alone = Sampler(seed, num_images, local * world_size, steps)
    shared = Sampler(seed, num_images, local * world_size, steps, world_size=world_size)
    assert shared.local_batch_size == local
    step = data.draw(st.integers(0, steps - 1))
    assert_same(alone.batch(step), joined([shared.batch(step, rank) for rank in range(world_size)]))


def test_sampler_batch_does_not_depend_on_batch_size_or_earlier_calls() -> None:
    long = Sampler(5, 17, 6, 100)
    short = Sampler(5, 17, 3, 50)
    indices = joined([long.batch(step) for step in range(25)])
    backwards = [short.batch(step) for step in reversed(range(50))]
    assert_same(indices, joined(backwards[::-1]))


def test_sampler_batch_of_a_far_step_is_fast() -> None:
    # A sampler that iterated up to the step would not return.
    far = Sampler(0, 1000, 8, 10**15).batch(10**15 - 1)
    assert len(set(far.indices.tolist())) >= 4


def test_sampler_seeds_and_epochs_differ() -> None:
    one, other = Sampler(0, 500, 500, 2), Sampler(1, 500, 500, 2)
    for left, right in ((one.batch(0), other.batch(0)), (one.batch(0), one.batch(1))):
        # Independent permutations agree in one place on average.
        assert (left.indices == right.indices).sum() < 10
        assert (left.crop == right.crop).mean() < 0.01
        assert 0.4 < (left.flip == right.flip).mean() < 0.6


def test_sampler_crops_and_flips_are_uniform_and_independent() -> None:
    count = 40_000
    samples = Sampler(7, 1000, count, 1).batch(0)
    assert samples.indices.dtype == np.int64
    assert samples.crop.dtype == np.float32
    assert samples.crop.shape == (count, 2)
    assert samples.flip.dtype == np.bool_
    assert samples.crop.min() >= 0
    assert samples.crop.max() < 1
    # Five standard deviations of the mean of `count` draws.
    assert np.abs(samples.crop.mean(0) - 0.5).max() < 5 * np.sqrt(1 / 12 / count)
    assert abs(samples.flip.mean() - 0.5) < 5 * np.sqrt(0.25 / count)
    columns = np.column_stack([samples.crop, samples.flip, samples.indices])
    assert np.abs(np.corrcoef(columns.T) - np.eye(4)).max() < 5 / np.sqrt(count)
    histogram, _ = np.histogram(samples.crop[:, 0], bins=16, range=(0, 1))
    assert ((histogram - count / 16) ** 2 / (count / 16)).sum() < 50  # χ², 15 degrees of freedom: p = 1e-5


def test_sampler_permutations_are_uniform() -> None:
    epochs = 6000
    firsts = [int(Sampler(seed, 6, 1, 1).batch(0).indices[0]) for seed in range(epochs)]
    counts = np.bincount(firsts, minlength=6)
    assert ((counts - epochs / 6) ** 2 / (epochs / 6)).sum() < 36  # χ², 5 degrees of freedom: p = 1e-6


@pytest.mark.parametrize("fit", ["center_crop", "squash"])
def test_sampler_fixed_fits_crop_the_center(fit: str) -> None:
    fixed, free = Sampler(3, 50, 50, 1, fit=fit).batch(0), Sampler(3, 50, 50, 1).batch(0)
    assert (fixed.crop == 0.5).all()
    np.testing.assert_array_equal(fixed.indices, free.indices)
    np.testing.assert_array_equal(fixed.flip, free.flip)
    assert free.flip.any()
    assert not Sampler(3, 50, 50, 1, fit=fit, flip=False).batch(0).flip.any()


def test_sampler_output_is_pinned() -> None:
    # A run that was interrupted under an older version has to go on as it would have.
    samples = Sampler(2024, 10, 5, 4).batch(1)
    assert samples.indices.tolist() == PINNED_INDICES
    np.testing.assert_array_equal((samples.crop * 2**24).astype(int), PINNED_CROPS)
    assert samples.flip.tolist() == PINNED_FLIPS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 5, "world_size": 2}, "train.batch_size 5 cannot be shared evenly by 2"),
        ({"num_images": 0}, "0 images"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
    ],
)
def test_sampler_refuses_bad_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampler(**{"seed": 0, "num_images": 4, "batch_size": 4, "steps": 4, **arguments})


def test_sampler_batch_raises_outside_the_run() -> None:
    sampler = Sampler(0, 4, 4, 4, world_size=2)
    for step, rank in ((4, 0), (-1, 0), (0, 2)):
        with pytest.raises(IndexError):
            sampler.batch(step, rank)
