"""Stylize image files."""

import contextlib
import logging
import os
import unicodedata
from collections.abc import Callable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastnst.device import resolve_device
from fastnst.errors import DataError, DeviceError, UserError
from fastnst.images import (
    OTHER_SUFFIXES,
    READABLE_SUFFIXES,
    SUFFIXES,
    check_replaceable,
    check_writable_name,
    check_writable_size,
    printable,
    read_header,
    read_with_metadata,
    write_image,
)
from fastnst.inference.tensors import resolve, stylize_pixels
from fastnst.models.style_model import load_style_model
from fastnst.models.transform_net import TransformNet
from fastnst.progress import ProgressReport, counted, phase
from fastnst.storage import ForeignFileError, check_folder

log = logging.getLogger(__name__)

# Of the result, for sources whose suffix cannot be written; .png for all others.
_RESULT_SUFFIX = {".jpe": ".jpg", ".jfif": ".jpg", ".mpo": ".jpg"}


def stylize_files(
    model: Path,
    images: Sequence[Path],
    out: Path | str,
    *,
    device: str = "auto",
    precision: str = "auto",
    overwrite: bool = False,
    written: Callable[[Path], None] = lambda _: None,
) -> list[Path]:
    """Stylize image files with a style model.

    The result has the size of its source (after its orientation tag) and keeps its transparency, resolution and EXIF
    tags; for JPEG, which has no transparency, the image is composited on white. An image that fails is logged, and the
    others go on.

    Args:
        model: a `model.safetensors`, or the run directory that holds one.
        images: files, and folders of images (without subfolders).
        out: for one image the output file, with a suffix of JPEG, PNG or WebP; for several, without a suffix, or with
            a slash at its end, a folder in which each keeps its name. Names that clash are told apart.
        device: `auto`, `cuda` or `cpu`.
        precision: `auto` (fp32), `bf16`, `fp16` or `fp32`.
        overwrite: also replace files that fastnst did not write; by default only its own results are. Inputs never.
        written: called with each output file once it is complete.

    Returns:
        The output files, in the order of their sources.

    Raises:
        UserError: an output would replace an input, or `out` must be a folder and is none.
        ForeignFileError: an output would replace a file that fastnst did not write; nothing was stylized.
        DataError: the model cannot be used, the storage fails, or, after all others are done, some image failed.
        DeviceError: no such device, or it lacks the memory for some image.
    """
    jobs = _plan(images, out, overwrite=overwrite)
    unwritable = _unwritable(jobs)
    if unwritable and len(jobs) == 1:
        raise unwritable[jobs[0]]
    where = resolve_device(device)
    precision = resolve(precision, where)
    net = load_style_model(model, device=where)
    results: list[Path] = []
    failures: list[UserError] = []
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(ProgressReport("stylize", len(jobs), "images")) if len(jobs) > 1 else None
        if progress is None:
            stack.enter_context(phase("stylize"))
        # Of a large image; one bar at a time.
        strips = stack.enter_context(counted("stylize", "strips")) if progress is None else _noted(progress)
        for job in jobs:
            try:
                if job in unwritable:
                    raise unwritable[job]
                _stylize_file(net, job, precision, strips, overwrite=overwrite)
            except UserError as error:
                if len(jobs) == 1 or _storage_refuses(error):
                    raise
                failures.append(error)
                log.warning("%s", error)
            else:
                results.append(job.result)
                written(job.result)
            if progress is not None:
                progress.advance(note="")
    if failures:
        kind = DeviceError if all(isinstance(error, DeviceError) for error in failures) else DataError
        others = f"the others are in {out}" if results else "nothing was written"
        raise kind(f"{len(failures)} of {len(jobs)} images could not be stylized, see above; {others}")
    return results


def _noted(progress: ProgressReport) -> Callable[[int, int], None]:
    return lambda done, total: progress.advance(0, note=f"strip {done} of {total}")


class _Job(NamedTuple):
    source: Path
    result: Path


def _plan(images: Sequence[Path], out: Path | str, *, overwrite: bool) -> list[_Job]:
    """Assign an output to every source, and check that all may be written, or refuse them all."""
    # `Path` drops a slash at the end, with which a folder is meant, whether it exists or has a dot in its name.
    is_folder = os.fspath(out).endswith(("/", "/."))
    out = Path(out)
    is_folder = is_folder or out.is_dir()
    sources = list(dict.fromkeys(file for image in images for file in _files_of(image)))
    if not sources:
        raise UserError("no image was named; give one or more files or folders")
    one = len(sources) == 1 and not images[0].is_dir()
    if one and not is_folder and out.suffix:
        if out.suffix.lower() not in SUFFIXES:
            raise DataError(
                f"cannot write {printable(out)}: {out.suffix} is not a supported format; "
                f"end the name in {', '.join(SUFFIXES)}, or in / for a folder"
            )
        jobs = [_Job(sources[0], out)]
    elif out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, and a folder is needed; name a folder")
    elif out.suffix.lower() in SUFFIXES and not is_folder:
        given = "a folder was given" if len(sources) == 1 else f"there are {len(sources)} to write"
        raise UserError(f"--out {out} names one image, and {given}; name a folder")
    else:
        jobs = [_Job(source, out / name) for source, name in _result_names(sources).items()]
    _check_results(jobs, overwrite=overwrite)
    return jobs


def _files_of(image: Path) -> list[Path]:
    if not image.is_dir():
        return [image]
    try:
        entries = sorted(entry for entry in image.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read the folder {image}: {error.strerror}; check its permissions") from error
    files = [entry for entry in entries if not entry.is_dir()]
    found = [file for file in files if file.suffix.lower() in READABLE_SUFFIXES | OTHER_SUFFIXES]
    left_out: list[str] = []
    if number := len(files) - len(found):
        suffixes = sorted({file.suffix or "no suffix" for file in files} - {file.suffix for file in found})
        more = ", …" if len(suffixes) > 8 else ""
        left_out.append(f"{number} other file{'s'[: number > 1]} ({', '.join(suffixes[:8])}{more})")
    if folders := len(entries) - len(files):
        left_out.append(f"{folders} subfolder{'s'[: folders > 1]}")
    if not found:
        only = f", only {' and '.join(left_out)}" if left_out else ""
        raise DataError(f"the folder {printable(image)} holds no image{only}; give another")
    if left_out:
        log.info("%s: left out %s", printable(image), " and ".join(left_out))
    return found


def _result_names(sources: Sequence[Path]) -> dict[Path, str]:
    """Name each result after its source, and results of one name apart: a.png keeps its name, a.bmp gets a.bmp.png.

    Names that differ in case only count as one, since many file systems cannot tell them apart.
    """
    names: dict[Path, str] = {}
    taken: dict[str, Path] = {}
    # Images that keep their names come first.
    for source in sorted(sources, key=lambda source: _result_name(source) != source.name):
        wanted = _result_name(source)
        suffix = Path(wanted).suffix
        longer = [source.name + suffix] if wanted != source.name else []
        numbered = (f"{source.stem}-{number}{suffix}" for number in count(2))
        name = next(name for name in chain([wanted], longer, numbered) if _folded(name) not in taken)
        names[source] = name
        if name != wanted:
            shown = [printable(path) for path in (source, name, taken[_folded(wanted)])]
            log.info("%s: its result is named %s, apart from that of %s", *shown)
        taken[_folded(name)] = source
    return {source: names[source] for source in sources}


def _result_name(source: Path) -> str:
    suffix = source.suffix.lower()
    return source.name if suffix in SUFFIXES else source.stem + _RESULT_SUFFIX.get(suffix, ".png")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _check_results(jobs: Sequence[_Job], *, overwrite: bool) -> None:
    """Check, before any work, that every result may be written: no input, nor, unasked, what is not fastnst's."""
    inputs = {_identity(job.source): job.source for job in jobs}
    foreign: list[Path] = []
    for job in jobs:
        if replaced := inputs.get(_identity(job.result)):
            raise UserError(f"{job.result} would replace the input {replaced}; choose another --out, inputs are kept")
        try:
            check_replaceable(job.result, overwrite=overwrite)
        except ForeignFileError:
            foreign.append(job.result)
    if foreign:
        raise ForeignFileError(foreign[0], len(foreign) - 1)
    check_folder(jobs[0].result.parent)


def _unwritable(jobs: Sequence[_Job]) -> dict[_Job, DataError]:
    """Return why some results cannot be written: a name too long, a source too large for the result's format."""
    errors: dict[_Job, DataError] = {}
    for job in jobs:
        header = read_header(job.source)
        try:
            check_writable_name(job.result.name)
            # Of a source without a readable header, the reader says what is wrong.
            if header:
                check_writable_size(job.result, header.width, header.height)
        except DataError as error:
            errors[job] = error
    return errors


def _identity(path: Path) -> object:
    """Equal for two paths of one file, links included."""
    try:
        found = path.stat()
    except OSError:
        return path.resolve()
    return found.st_dev, found.st_ino


def _stylize_file(
    net: TransformNet,
    job: _Job,
    precision: str,
    progress: Callable[[int, int], None] | None,
    *,
    overwrite: bool,
) -> None:
    source = read_with_metadata(job.source, alpha=True)
    pixels = source.pixels
    try:
        stylized = stylize_pixels(net, pixels[..., :3], precision=precision, progress=progress)
    except (DataError, DeviceError) as error:
        raise type(error)(f"cannot stylize {job.source}: {error}") from error
    if pixels.shape[2] == 4:
        stylized = np.concatenate([stylized, pixels[..., 3:]], axis=2)
    write_image(job.result, stylized, exif=source.exif, dpi=source.dpi, overwrite=overwrite)


def _storage_refuses(error: UserError) -> bool:
    """Whether `error` came from the operating system while writing, and would stop every other image, too."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno is not None
