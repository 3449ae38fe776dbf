"""Stylize image files."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastnst.device import resolve_device
from fastnst.errors import DataError, DeviceError, UserError
from fastnst.images import SUFFIXES, check_writable_suffix, read_image, to_array, to_tensor, write_image
from fastnst.inference.tensors import free_bytes, needed_bytes, resolve, stylize, too_large
from fastnst.models.style_model import load_style_model
from fastnst.models.transform_net import TransformNet
from fastnst.progress import ProgressReport, phase

log = logging.getLogger(__name__)

# Suffixes searched for in a folder, and the suffix of the result: the same if that format can be written.
_RESULT_SUFFIX = {
    **{suffix: suffix for suffix in SUFFIXES},
    **{".jpe": ".jpg", ".jfif": ".jpg", ".bmp": ".png", ".tif": ".png", ".tiff": ".png"},
}


def stylize_files(
    model: Path,
    images: Sequence[Path],
    out: Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    written: Callable[[Path], None] = lambda _: None,
) -> list[Path]:
    """Stylize image files with a style model.

    The result has the size of its source (after its orientation tag) and keeps its transparency; for JPEG, which has
    none, the image is composited on white. An image that fails is logged, and the others go on.

    Args:
        model: a `model.safetensors`, or the run directory that holds one.
        images: files, and folders of images (without subfolders).
        out: for one image the output file, with a suffix of JPEG, PNG or WebP; for several, or without a suffix, a
            folder in which each keeps its name. Files in it are replaced, inputs never.
        device: `auto`, `cuda` or `cpu`.
        precision: `auto` (fp32), `bf16`, `fp16` or `fp32`.
        written: called with each output file once it is complete.

    Returns:
        The output files, in the order of their sources.

    Raises:
        UserError: an output would replace an input or another output, or `out` must be a folder and is none.
        DataError: the model cannot be used, the storage fails, or, after all others are done, some image failed.
        DeviceError: no such device, or it lacks the memory for some image.
    """
    jobs = _plan(images, out)
    where = resolve_device(device)
    precision = resolve(precision, where)
    net = load_style_model(model, device=where)
    results: list[Path] = []
    failures: list[UserError] = []
    with ProgressReport("stylize", len(jobs), "images") if len(jobs) > 1 else phase("stylize") as progress:
        for job in jobs:
            try:
                _stylize_file(net, job, precision)
            except UserError as error:
                if len(jobs) == 1 or _storage_refuses(error):
                    raise
                failures.append(error)
                log.warning("%s", error)
            else:
                results.append(job.result)
                written(job.result)
            if progress is not None:
                progress.advance()
    if failures:
        kind = DeviceError if all(isinstance(error, DeviceError) for error in failures) else DataError
        raise kind(f"{len(failures)} of {len(jobs)} images could not be stylized, see above; the others are in {out}")
    return results


class _Job(NamedTuple):
    source: Path
    result: Path


def _plan(images: Sequence[Path], out: Path) -> list[_Job]:
    """Assign an output to every source, or refuse them all."""
    sources = list(dict.fromkeys(file for image in images for file in _files_of(image)))
    if not sources:
        raise UserError("no image was named; give one or more files or folders")
    one = len(sources) == 1 and not images[0].is_dir()
    if one and not out.is_dir() and out.suffix:
        check_writable_suffix(out)
        jobs = [_Job(sources[0], out)]
    elif out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, and a folder is needed for {len(sources)} images; name a folder")
    elif out.suffix.lower() in SUFFIXES and not out.is_dir():
        raise UserError(f"--out {out} names one image, and there are {len(sources)} to write; name a folder")
    else:
        jobs = [_Job(source, out / _result_name(source)) for source in sources]
    _refuse_overwriting(jobs)
    return jobs


def _files_of(image: Path) -> list[Path]:
    if not image.is_dir():
        return [image]
    try:
        entries = sorted(image.iterdir())
    except OSError as error:
        raise DataError(f"cannot read the folder {image}: {error.strerror}; check its permissions") from error
    visible = [entry for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    files = [entry for entry in visible if entry.suffix.lower() in _RESULT_SUFFIX]
    if not files:
        raise DataError(f"the folder {image} holds no image ({', '.join(_RESULT_SUFFIX)}); give another")
    return files


def _result_name(source: Path) -> str:
    suffix = source.suffix.lower()
    return source.name if suffix in SUFFIXES else source.stem + _RESULT_SUFFIX.get(suffix, ".png")


def _refuse_overwriting(jobs: Sequence[_Job]) -> None:
    inputs = {_identity(job.source): job.source for job in jobs}
    results: dict[object, Path] = {}
    for job in jobs:
        identity = _identity(job.result)
        if identity in inputs:
            replaced = inputs[identity]
            raise UserError(f"{job.result} would replace the input {replaced}; choose another --out, inputs are kept")
        if identity in results:
            raise UserError(
                f"{results[identity]} and {job.source} would both become {job.result}; rename one, or write them to "
                "different folders"
            )
        results[identity] = job.source


def _identity(path: Path) -> object:
    """Equal for two paths of one file, links included."""
    try:
        found = path.stat()
    except OSError:
        return path.resolve()
    return found.st_dev, found.st_ino


def _stylize_file(net: TransformNet, job: _Job, precision: str) -> None:
    pixels = read_image(job.source, alpha=True)
    height, width = pixels.shape[:2]
    device = next(net.parameters()).device
    free = free_bytes(device)
    # The operating system overcommits a CPU's memory and kills the process later: check first.
    if device.type == "cpu" and free is not None and needed_bytes(1, height, width, device, precision) > free:
        raise DeviceError(f"cannot stylize {job.source}: {too_large(1, height, width, device, precision)}")
    try:
        stylized = to_array(stylize(net, to_tensor(pixels[..., :3]), precision=precision))
    except (DataError, DeviceError) as error:
        raise type(error)(f"cannot stylize {job.source}: {error}") from error
    write_image(job.result, np.concatenate([stylized, pixels[..., 3:]], axis=2))


def _storage_refuses(error: UserError) -> bool:
    """Whether `error` came from the operating system while writing, and would stop every other image, too."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno is not None
