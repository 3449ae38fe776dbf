"""Images by NVIDIA DALI: decoded, cut out and resized on the GPU, or in DALI's threads where there is none.

The order of the run feeds it: for each step, the files' bytes (read ahead by threads) and each image's window.
Nothing in the pipeline is random. Images that are not safe for DALI (see `fastnst.data.dali_safe`), such as CMYK, are
cropped by Pillow in the reading threads and enter as uncompressed PNM, which passes through unchanged. Progressive
JPEGs are safe: on a GPU, DALI itself keeps from the decoding engines what these do not read.

Images are decoded whole, though only their window is seen. `image_slice`, which decodes a region, gives the same
bits with a margin around the window; on a CPU it saves next to nothing, as JPEG's entropy coding has to be read all the
same. What it does to the share of the GPU's decoding engines was not measured; nor were, on a GPU, the settings below,
which follow DALI's documentation. On a CPU a thread per core with three batches ready is within the noise of the best
(`benchmarks/results/data_pipeline_2_cores_256_settings.json`, by `benchmarks/data_pipeline.py --tune`).
"""

import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from fastnst.data.crop import crop_box, read_crop, read_image
from fastnst.data.manifest import Entry
from fastnst.errors import DataError
from fastnst.images import UnusableImageError, printable

if TYPE_CHECKING:
    from fastnst.config import DataConfig
    from fastnst.data.manifest import Manifest
    from fastnst.data.replacements import ImageReplacer
    from fastnst.data.sampler import Sampler

HW_DECODER_LOAD = 0.65
"""Share of the JPEGs that goes to the GPU's decoding engines, where it has them; DALI's own value."""
LARGEST_HINT = 2048
"""Pixels of a side for which the decoding engines' memory is set aside at the start; rare larger images grow it."""

_log = logging.getLogger(__name__)


class DaliLoader:
    """See `fastnst.data.open_loader`."""

    def __init__(
        self,
        manifest: "Manifest",
        order: "Sampler",
        config: "DataConfig",
        *,
        device: torch.device,
        replacements: "ImageReplacer",
        start_step: int = 0,
        rank: int = 0,
    ) -> None:
        self._feed = _Feed(manifest, order, config, replacements, rank)
        self._config = config
        self._device = device
        self._step = start_step
        self._retried = -1
        self._pipeline: Pipeline | None = self._start_pipeline()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        if self._pipeline is None:
            raise StopIteration
        while True:
            try:
                batch = self._run(self._pipeline)
            except StopIteration:
                # The feed has ended, and what it had fed before is delivered.
                if self._feed.error is not None:
                    raise self._feed.error from None
                raise
            except RuntimeError as error:
                # Ends, because each time it finds at least one more image to blame, or raises at the second time.
                self._pipeline = self._recover(error)
            else:
                self._step += 1
                return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def seek(self, step: int) -> None:
        """Go on with `step`; what was read ahead is read again."""
        self._pipeline = None
        self._step = step
        self._pipeline = self._start_pipeline()

    def close(self) -> None:
        """End the pipeline and the reading threads."""
        self._pipeline = None
        self._feed.close()

    def _run(self, pipeline: Pipeline) -> torch.Tensor:
        if self._device.type != "cuda":
            (squares,) = pipeline.run()
            # Not copied: this executor (`exec_dynamic`) makes a buffer for each batch, and the tensor keeps it.
            return torch.from_dlpack(squares.as_tensor())
        stream = torch.cuda.current_stream(self._device)
        (squares,) = pipeline.run(stream)
        # Bound to this stream by `run`, and copied on it: the memory goes back to DALI in stream order, whichever
        # streams the batch itself is used on later.
        return torch.from_dlpack(squares.as_tensor()).clone()

    def _start_pipeline(self) -> Pipeline:
        self._feed.seek(self._step)
        return _build(
            self._feed,
            self._feed.order.local_batch_size,
            self._config.image_size,
            self._device,
            threads=self._config.workers or 1,
            prefetch=self._config.prefetch,
            largest=self._feed.usual_size(),
            # Where several processes share the cores, each would tie its threads to the same ones.
            affine=self._feed.order.world_size == 1,
        )

    def _recover(self, error: RuntimeError) -> Pipeline:
        """A new pipeline that goes on with the same step; the images that broke the old one are left to Pillow.

        DALI may not say which they are, so those in flight are tried one by one. What Pillow cannot read either is
        replaced when it is read. If none is to blame, the file may have been written to just then: once more.
        """
        self._pipeline = None
        in_flight = self._feed.images(self._step, self._config.prefetch + 1)
        broken = [index for index in in_flight if not self._decodes(index)]
        if not broken and self._retried < self._step:
            self._retried = self._step
            _log.warning("DALI failed in step %d (%s); it is started again", self._step + 1, _last_line(error))
            return self._start_pipeline()
        if not broken:
            names = ", ".join(printable(self._feed.entries[index].path) for index in in_flight[:3])
            raise DataError(
                f"DALI failed in step {self._step + 1} ({_last_line(error)}), near {names}; "
                "use --loader pillow, or a smaller train.batch_size if memory ran out"
            ) from error
        for index in broken:
            _log.warning("DALI cannot decode %s; Pillow decodes it", printable(self._feed.entries[index].path))
        self._feed.by_pillow.update(broken)
        return self._start_pipeline()

    def _decodes(self, index: int) -> bool:
        entry = self._feed.entries[index]
        if index in self._feed.by_pillow:
            return True
        try:
            encoded = self._feed.read(entry)
        except UnusableImageError:
            return False
        whole = np.array([[0.0, 0.0]], np.float32), np.array([[entry.height, entry.width]], np.float32)
        probe = _build(lambda _: ([encoded], *whole), 1, self._config.image_size, self._device, threads=1, prefetch=1)
        try:
            self._run(probe)
        except RuntimeError:
            return False
        return True


def _build(
    source: Any,
    batch_size: int,
    image_size: int,
    device: torch.device,
    *,
    threads: int,
    prefetch: int,
    largest: tuple[int, int] = (0, 0),
    affine: bool = True,
) -> Pipeline:
    """Encoded images and their windows → uint8 squares on the device.

    On a GPU, memory for images of `largest` width and height is set aside, and with `affine` each decoding thread
    keeps to one core.
    """
    on_gpu = device.type == "cuda"
    device_id = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
    )
    with pipeline:
        encoded, start, end = fn.external_source(source=source, num_outputs=3, batch=True)
        if on_gpu:
            # Without `jpeg_fancy_upsampling` the GPU repeats chroma samples where libjpeg interpolates.
            decoded = fn.decoders.image(
                encoded,
                device="mixed",
                output_type=types.RGB,
                hw_decoder_load=HW_DECODER_LOAD,
                jpeg_fancy_upsampling=True,
                preallocate_width_hint=largest[0],
                preallocate_height_hint=largest[1],
                affine=affine,
            )
        else:
            decoded = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        squares = fn.resize(
            decoded,
            size=[image_size, image_size],
            roi_start=start,
            roi_end=end,
            interp_type=types.INTERP_TRIANGULAR,
            antialias=True,
        )
        pipeline.set_outputs(squares)
    pipeline.build()
    return pipeline


class _Feed:
    """What a pipeline asks for: iteration → encoded images, window starts and window ends of one step."""

    def __init__(
        self, manifest: "Manifest", order: "Sampler", config: "DataConfig", replacements: "ImageReplacer", rank: int
    ) -> None:
        self.entries = manifest.images
        self.order = order
        self.by_pillow: set[int] = set()
        """Images that DALI turned out not to decode, though they are plain."""
        self.error: DataError | None = None
        """Why there is nothing more to feed, if that is not the end of the run."""
        self._replacements = replacements
        self._folder = manifest.folder
        self._image_size = config.image_size
        self._ahead = config.prefetch
        self._rank = rank
        assert config.workers is not None
        self._pool = ThreadPoolExecutor(config.workers, thread_name_prefix="read")
        self._reading: deque[tuple[list[int], list[Future[_Sample]]]] = deque()
        self._next_step = 0

    def __call__(self, _iteration: int) -> "tuple[list[np.ndarray], np.ndarray, np.ndarray]":
        self._read_ahead()
        while self.error is None and self._reading:
            step = self._next_step - len(self._reading)
            samples = self._collect(step, *self._reading[0])
            if samples is not None:
                self._reading.popleft()
                self._read_ahead()
                encoded, start, end = zip(*samples, strict=True)
                return list(encoded), np.array(start, dtype=np.float32), np.array(end, dtype=np.float32)
            if self.error is None:
                self.seek(step)
                self._read_ahead()
        raise StopIteration

    def seek(self, step: int) -> None:
        """Go on with `step`."""
        for _, futures in self._reading:
            for future in futures:
                future.cancel()
        self._reading.clear()
        self._next_step = step

    def close(self) -> None:
        self._reading.clear()
        self._pool.shutdown(cancel_futures=True)

    def images(self, step: int, count: int) -> list[int]:
        """The different images of `count` steps from `step` on."""
        steps = range(step, min(step + count, self.order.steps))
        return sorted({int(index) for each in steps for index in self._places(each)[0]})

    def usual_size(self) -> tuple[int, int]:
        """Width and height that 99 of 100 JPEGs keep within, and not more than `LARGEST_HINT`; 0 if there are none."""
        sizes = [(entry.width, entry.height) for entry in self.entries if entry.format == "JPEG" and entry.plain]
        if not sizes:
            return 0, 0
        width, height = np.minimum(np.quantile(sizes, 0.99, axis=0, method="higher"), LARGEST_HINT).astype(int)
        return int(width), int(height)

    def read(self, entry: Entry) -> np.ndarray:
        """The bytes of an image's file, uint8 `[size]`."""
        return np.frombuffer(read_image(self._path(entry), entry), np.uint8)

    def _collect(self, step: int, indices: list[int], futures: "list[Future[_Sample]]") -> "list[_Sample] | None":
        """The samples of `step`; None if an image failed, which is noted."""
        samples: list[_Sample] = []
        failed: list[tuple[int, str]] = []
        for index, future in zip(indices, futures, strict=True):
            try:
                samples.append(future.result())
            except UnusableImageError as error:
                failed.append((index, str(error)))
        if not failed:
            return samples
        try:
            self._replacements.fail(step, failed)
        except DataError as error:
            self.error = error
        return None

    def _places(self, step: int) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Images, crops and flips of a step."""
        samples = self.order.batch(step, self._rank)
        return self._replacements.indices(step, samples.indices).tolist(), samples.crop, samples.flip

    def _read_ahead(self) -> None:
        while len(self._reading) < self._ahead and self._next_step < self.order.steps:
            indices, crops, flips = self._places(self._next_step)
            places = zip(indices, crops, flips, strict=True)
            self._reading.append(
                (indices, [self._pool.submit(self._sample, i, crop, bool(f)) for i, crop, f in places])
            )
            self._next_step += 1

    def _sample(self, index: int, crop: np.ndarray, flip: bool) -> "_Sample":
        entry = self.entries[index]
        left, top, right, bottom = window = crop_box(entry.width, entry.height, self.order.fit, crop, self._image_size)
        if entry.plain and index not in self.by_pillow:
            # A window that runs from right to left is mirrored.
            return self.read(entry), (top, right if flip else left), (bottom, left if flip else right)
        size = self._image_size
        square = read_crop(self._path(entry), entry, window, size, flip)
        header = f"P6\n{size} {size}\n255\n".encode()
        return np.frombuffer(header + square.tobytes(), np.uint8), (0.0, 0.0), (float(size), float(size))

    def _path(self, entry: Entry) -> str:
        return os.path.join(self._folder, entry.path)  # noqa: PTH118


_Sample = tuple[np.ndarray, tuple[float, float], tuple[float, float]]
"""Encoded image, and start and end of its window as (y, x)."""


def _last_line(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if "no longer valid" not in line]
    return (lines[-1] if lines else type(error).__name__)[:160]
