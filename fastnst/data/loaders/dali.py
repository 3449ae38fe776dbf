"""Load images with NVIDIA DALI, which decodes, crops and resizes on the GPU or in CPU threads.

For each step, the pipeline gets the files' bytes, read ahead by threads, and each image's crop box; nothing in it is
random. Images that are not DALI-safe (see `fastnst.data.dali_safe`), such as CMYK, are cropped by Pillow in the reading
threads and enter as uncompressed PNM, which passes through unchanged. Progressive JPEGs are safe: on a GPU, DALI itself
decodes them without the decoding engines, which do not support them.

Images are decoded whole, although only a box is used. `image_slice`, which decodes a region, yields the same bits with
a margin around the box, but on a CPU saves almost nothing, as JPEG's entropy coding has to be read in full. Its effect
on the GPU's decoding engines was not measured; nor were, on a GPU, the settings below, which follow DALI's
documentation. On a CPU, one thread per core with three batches ready is within noise of the best
(`benchmarks/results/data_pipeline_2_cores_256_settings.json`, by `benchmarks/data_pipeline.py --tune`).
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from fastnst.data.crop import read_checked, read_crop
from fastnst.data.loaders.base import Loader, LoaderArgs, Sample
from fastnst.data.manifest import ImageEntry
from fastnst.errors import DataError
from fastnst.images import UnusableImageError, printable

HW_DECODER_LOAD = 0.65
"""Share of the JPEGs that the GPU's decoding engines get, where there are any; DALI's own default."""
MAX_SIZE_HINT = 2048
"""Largest side, in pixels, for which the engines' memory is preallocated; rarer larger images grow it."""

_Encoded = tuple[np.ndarray, tuple[float, float], tuple[float, float]]
"""Encoded image, and start and end of its crop box as (y, x)."""

log = logging.getLogger(__name__)


class DaliLoader(Loader):
    """See `open_loader`."""

    def __init__(self, args: LoaderArgs) -> None:
        super().__init__(args)
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="read")
        self._step = args.start_step
        self._retried_step = -1
        self._by_pillow: set[int] = set()
        """Images that DALI failed to decode, although they are marked DALI-safe."""
        self._error: DataError | None = None
        """Why `_feed` ended early."""
        self._pipeline: Pipeline | None = self._start_pipeline()

    def __next__(self) -> torch.Tensor:
        if self._pipeline is None:
            raise StopIteration
        while True:
            try:
                batch = self._run(self._pipeline)
            except StopIteration:
                # `_feed` has ended, and all that it fed before is delivered.
                if self._error is not None:
                    raise self._error from None
                raise
            except RuntimeError as error:
                # Terminates: each time, `_recover` finds another broken image, or raises the second time.
                self._pipeline = self._recover(error)
            else:
                self._step += 1
                return batch

    def seek(self, step: int) -> None:
        """Continue with `step`, discarding what was read ahead."""
        self._pipeline = None
        self._step = step
        self._pipeline = self._start_pipeline()

    def close(self) -> None:
        """End the pipeline and the reading threads; may be called twice."""
        self._pipeline = None
        super().close()

    def _run(self, pipeline: Pipeline) -> torch.Tensor:
        if self._device.type != "cuda":
            (crops,) = pipeline.run()
            # Not copied: this executor (`exec_dynamic`) allocates a buffer per batch, and the tensor keeps it alive.
            return torch.from_dlpack(crops.as_tensor())
        stream = torch.cuda.current_stream(self._device)
        (crops,) = pipeline.run(stream)
        # `run` binds the buffer to this stream, and the copy runs on it: so DALI gets the memory back in stream order,
        # whichever streams use the batch later.
        return torch.from_dlpack(crops.as_tensor()).clone()

    def _start_pipeline(self) -> Pipeline:
        self._rewind(self._step)
        return _build(
            self._feed,
            self._sampler.local_batch_size,
            self._config.image_size,
            self._device,
            threads=self._workers,
            prefetch=self._config.prefetch,
            size_hint=_size_hint(self._manifest.images),
            # Several processes on the same cores would pin their threads to the same ones.
            affine=self._sampler.world_size == 1,
        )

    def _feed(self, _iteration: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Return the encoded images of the next step, and start and end of their crop boxes."""
        if self._error is not None:
            raise StopIteration
        try:
            encoded, start, end = zip(*self._next_parts(), strict=True)
        except DataError as error:
            self._error = error
            raise StopIteration from None
        return list(encoded), np.array(start, dtype=np.float32), np.array(end, dtype=np.float32)

    def _submit(self, samples: list[Sample]) -> "list[Future[tuple[_Encoded | None, list[tuple[int, str]]]]]":
        return [self._pool.submit(self._read, sample) for sample in samples]

    def _read(self, sample: Sample) -> tuple[_Encoded | None, list[tuple[int, str]]]:
        try:
            return self._encode(sample), []
        except UnusableImageError as error:
            return None, [(sample.index, str(error))]

    def _encode(self, sample: Sample) -> _Encoded:
        entry, box = self._manifest.images[sample.index], self._crop_box(sample)
        if entry.dali_safe and sample.index not in self._by_pillow:
            left, top, right, bottom = box
            # A box from right to left mirrors.
            if sample.flip:
                left, right = right, left
            return self._read_bytes(sample.index), (top, left), (bottom, right)
        size = self._config.image_size
        crop = read_crop(self._path(sample.index), entry, box, size, sample.flip)
        header = f"P6\n{size} {size}\n255\n".encode()
        return np.frombuffer(header + crop.tobytes(), np.uint8), (0.0, 0.0), (float(size), float(size))

    def _read_bytes(self, index: int) -> np.ndarray:
        return np.frombuffer(read_checked(self._path(index), self._manifest.images[index]), np.uint8)

    def _recover(self, error: RuntimeError) -> Pipeline:
        """Return a new pipeline for the same step that leaves the images that broke the old one to Pillow.

        DALI may not name them, so the images in flight are tried one by one. One that Pillow cannot read either fails
        when it is read, and is replaced. If none is broken, the file may have been written to just then: try once more.
        """
        self._pipeline = None
        steps = range(self._step, min(self._step + self._config.prefetch + 1, self._sampler.steps))
        in_flight = sorted({sample.index for step in steps for sample in self._samples(step)})
        broken = [index for index in in_flight if not self._decodes(index)]
        if not broken and self._retried_step < self._step:
            self._retried_step = self._step
            log.warning("DALI failed in step %d (%s); it is restarted", self._step + 1, _last_line(error))
            return self._start_pipeline()
        if not broken:
            names = ", ".join(printable(self._manifest.images[index].path) for index in in_flight[:3])
            raise DataError(
                f"DALI failed in step {self._step + 1} ({_last_line(error)}), near {names}; "
                "use --loader pillow, or a smaller train.batch_size if memory ran out"
            ) from error
        for index in broken:
            log.warning("DALI cannot decode %s; Pillow decodes it", printable(self._manifest.images[index].path))
        self._by_pillow.update(broken)
        return self._start_pipeline()

    def _decodes(self, index: int) -> bool:
        """Whether DALI decodes an image, or does not have to."""
        if index in self._by_pillow:
            return True
        try:
            encoded = self._read_bytes(index)
        except UnusableImageError:
            return False
        entry = self._manifest.images[index]
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
    size_hint: tuple[int, int] = (0, 0),
    affine: bool = True,
) -> Pipeline:
    """Build a pipeline: encoded images and their crop boxes → uint8 crops on the device.

    Args:
        source: callable, iteration → encoded images, and start and end of their boxes, float32 `[B, 2]` as (y, x).
        batch_size: images per batch.
        image_size: side of the crops, in pixels.
        device: where images are decoded.
        threads: decoding threads.
        prefetch: batches kept ready.
        size_hint: width and height for which a GPU's decoder preallocates memory.
        affine: pin each thread to a core (GPU only).
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
            # Without `jpeg_fancy_upsampling`, the GPU repeats chroma samples, where libjpeg interpolates them.
            decoded = fn.decoders.image(
                encoded,
                device="mixed",
                output_type=types.RGB,
                hw_decoder_load=HW_DECODER_LOAD,
                jpeg_fancy_upsampling=True,
                preallocate_width_hint=size_hint[0],
                preallocate_height_hint=size_hint[1],
                affine=affine,
            )
        else:
            decoded = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        crops = fn.resize(
            decoded,
            size=[image_size, image_size],
            roi_start=start,
            roi_end=end,
            interp_type=types.INTERP_TRIANGULAR,
            antialias=True,
        )
        pipeline.set_outputs(crops)
    pipeline.build()
    return pipeline


def _size_hint(entries: Sequence[ImageEntry]) -> tuple[int, int]:
    """Return the 99 % quantiles of the JPEGs' widths and heights, up to `MAX_SIZE_HINT`; 0 without JPEGs."""
    sizes = [(entry.width, entry.height) for entry in entries if entry.format == "JPEG" and entry.dali_safe]
    if not sizes:
        return 0, 0
    width, height = np.minimum(np.quantile(sizes, 0.99, axis=0, method="higher"), MAX_SIZE_HINT).astype(int)
    return int(width), int(height)


def _last_line(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if "no longer valid" not in line]
    return (lines[-1] if lines else type(error).__name__)[:160]
