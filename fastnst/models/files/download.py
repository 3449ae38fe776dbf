"""Download one large file over HTTP: resumable, checked by SHA-256, once for parallel processes."""

import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastnst.errors import DataError
from fastnst.storage import lock_file, sha256_of, storage_error, sync_folder

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

_BLOCK = 1 << 18


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, with the size and SHA-256 that it must have."""

    url: str
    sha256: str
    size: int
    file_name: str


class DownloadError(DataError):
    """The download failed; the message is the reason alone."""


class _RetryableError(Exception):
    """The connection failed in a way that may pass; the `.part` file keeps the bytes so far."""


def download_file(
    source: RemoteFile,
    target: Path,
    *,
    progress: Progress | None = None,
    timeout: float = 15.0,
    attempts: int = 4,
    pause: float = 1.0,
) -> None:
    """Download `source` to `target`, complete and checked, or raise.

    Bytes gather in `target` + `.part`, which survives a failure: the next call requests the rest (HTTP Range), or reads
    from the start if the server ignores that. A file lock lets one process download while others wait for its result.

    Args:
        source: the file.
        target: replaced atomically, only by bytes with the right checksum.
        progress: called after each block.
        timeout: seconds without a byte after which a connection counts as cut.
        attempts: tries in a row without a new byte before giving up.
        pause: seconds before the second try, doubled for each further one.

    Raises:
        DownloadError: no connection, a refusal, wrong bytes, or no room on the disk.
    """
    if not re.match(r"https?://[^/]", source.url):
        raise DownloadError("the address does not begin with http://… or https://…")
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(target.with_name(target.name + ".lock")):
            if target.is_file() and sha256_of(target) == source.sha256:
                return
            _download(source, part, progress, timeout, attempts, pause)
            part.replace(target)
            sync_folder(target.parent)
    except OSError as error:
        raise DownloadError(str(storage_error(target, error))) from error


def _download(
    source: RemoteFile, part: Path, progress: Progress | None, timeout: float, attempts: int, pause: float
) -> None:
    resumed = _size_of(part) > 0
    fruitless = 0
    while True:
        before = _size_of(part)
        try:
            _request_rest(source, part, progress, timeout)
        except _RetryableError as cut:
            fruitless = 0 if _size_of(part) > before else fruitless + 1
            if fruitless >= attempts:
                kept = f"; {before:,} bytes are kept and the next try resumes there" if before else ""
                raise DownloadError(f"{cut}, after {attempts} tries{kept}") from cut
            time.sleep(min(pause * 2 ** max(fruitless - 1, 0), 30.0))
            continue
        if (found := sha256_of(part)) == source.sha256:
            return
        part.unlink()
        if not resumed:
            raise DownloadError(f"the server sent other bytes: SHA-256 is {found}, must be {source.sha256}")
        resumed = False  # the `.part` of an earlier call may have held other bytes: again from the start


def _request_rest(source: RemoteFile, part: Path, progress: Progress | None, timeout: float) -> None:
    """Request the bytes that `part` lacks, once; returns when it has the full size."""
    offset = _size_of(part)
    if offset > source.size:
        part.unlink()
        offset = 0
    if offset == source.size:
        return
    # Uncompressed, so that offsets are those of the file.
    headers = {"User-Agent": "fastnst", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(source.url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            part.unlink(missing_ok=True)
            raise _RetryableError("the server refused to resume the download") from error
        if error.code >= 500 or error.code in (408, 429):
            raise _RetryableError(f"the server answered {error.code} {error.reason}") from error
        raise DownloadError(f"the server answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _RetryableError(f"no connection: {getattr(error, 'reason', None) or error}") from error
    except ValueError as error:
        raise DownloadError(f"the address is invalid: {error}") from error
    with response:
        start = _start_of(response, offset, source.size)
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            _copy(response, file, start, source.size, progress)


def _start_of(response: http.client.HTTPResponse, offset: int, size: int) -> int:
    """Offset of the response in the file; DownloadError if it belongs to another file."""
    if response.status != 206:
        length = response.headers.get("Content-Length")
        if length is not None and length.isdigit() and int(length) != size:
            raise DownloadError(f"the server offers {int(length):,} bytes, must be {size:,}")
        return 0
    content_range = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range.strip())
    if found is None or int(found[1]) != offset or found[2] not in ("*", str(size)):
        raise DownloadError(
            f"asked for bytes {offset}-{size - 1}/{size}, the server sent {content_range or 'no range'!r}"
        )
    return offset


def _copy(response: http.client.HTTPResponse, file: BinaryIO, done: int, size: int, progress: Progress | None) -> None:
    while True:
        try:
            block = response.read(min(_BLOCK, size - done + 1))
        except (OSError, http.client.HTTPException) as error:
            raise _RetryableError(f"the connection was cut after {done:,} of {size:,} bytes: {error}") from error
        if not block:
            break
        done += len(block)
        if done > size:
            file.truncate(0)
            raise DownloadError(f"the server sends more than the {size:,} bytes of the file")
        file.write(block)
        if progress is not None:
            progress(done, size)
    if done < size:
        raise _RetryableError(f"the connection was cut after {done:,} of {size:,} bytes")


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
