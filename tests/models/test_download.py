"""Downloads of VGG19 from a local server, which may be faulty."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fastnst.models import weights as weights_module
from fastnst.models.files.download import DownloadError, RemoteFile, download_file
from fastnst.models.vgg19 import VGG19
from fastnst.models.weights import WeightsUnavailable, load_vgg19
from helpers.vgg19_files import vgg19_file, vgg19_state


@pytest.fixture(autouse=True)
def _log_messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastnst")


class _Server(ThreadingHTTPServer):
    """Serves one file, resumably unless set otherwise; records the Range header of each request."""

    content: bytes = b""
    ranges: list[str | None]
    cut_after: list[int]
    """Bytes to send before hanging up, for the first requests."""
    status: int = 0
    honours_range: bool = True
    wrong_range: str = ""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        if self.server.status:
            self.send_error(self.server.status)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.honours_range else 0
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            total = len(self.server.content)
            self.send_header("Content-Range", self.server.wrong_range or f"bytes {start}-{total - 1}/{total}")
        self.end_headers()
        if self.server.cut_after:
            body = body[: self.server.cut_after.pop(0)]
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing to stderr."""


@contextmanager
def _serving(content: bytes) -> Iterator[_Server]:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.content, server.ranges, server.cut_after = content, [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small VGG19 file, a few hundred kilobytes."""
    return Path(vgg19_file(tmp_path_factory.mktemp("served"), vgg19_state("relu1_2"))).read_bytes()


@pytest.fixture
def server(content: bytes) -> Iterator[_Server]:
    with _serving(content) as server:
        yield server


@pytest.fixture
def source(server: _Server, content: bytes) -> RemoteFile:
    url = f"http://127.0.0.1:{server.server_address[1]}/vgg19.pth"
    return RemoteFile(url, hashlib.sha256(content).hexdigest(), len(content), "vgg19-test.pth")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Target of the download, with the machine's own caches out of sight."""
    monkeypatch.setenv("FASTNST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "cache" / "weights" / "vgg19-test.pth"


def _auto(source: RemoteFile) -> VGG19:
    return load_vgg19("auto", last_layer="relu1_2", source=source, pause=0.0)


def _refused(source: RemoteFile, cached: Path) -> str:
    with pytest.raises(WeightsUnavailable) as caught:
        _auto(source)
    assert not cached.exists()
    message = str(caught.value)
    assert len(message.splitlines()) == 2
    for part in (source.url, "--vgg FILE", "--vgg random", str(cached)):
        assert part in message
    return message


def test_load_vgg19_auto_downloads_once(
    server: _Server,
    source: RemoteFile,
    cached: Path,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shown: list[tuple[object, ...]] = []

    @contextmanager
    def counted(*arguments: object, **options: object) -> Iterator[Callable[[int, int], None]]:
        shown.append((*arguments, *options.values()))
        yield lambda done, total: shown.append((done, total))

    monkeypatch.setattr(weights_module, "counted", counted)
    assert _auto(source).flavour == "torchvision"
    assert cached.read_bytes() == content
    assert shown[0] == ("download VGG19", "MB", 1e6)
    assert shown[1:] == sorted(shown[1:])
    assert shown[-1] == (len(content), len(content))
    assert any(f"downloading {source.url}" in message for message in caplog.messages)
    assert not list(cached.parent.glob("*.part"))
    caplog.clear()
    _auto(source)
    assert len(server.ranges) == 1
    assert caplog.messages == [f"VGG19: {cached} up to relu1_2, torchvision flavour (its SHA-256 is right)"]


@pytest.mark.parametrize(
    ("honours_range", "cuts", "ranges"),
    [(True, [30_000, 20_000], ["bytes=30000-", "bytes=50000-"]), (False, [30_000], ["bytes=30000-"])],
)
def test_download_resumes_a_cut_connection(
    *, server: _Server, source: RemoteFile, cached: Path, content: bytes, honours_range: bool, cuts: Any, ranges: Any
) -> None:
    server.honours_range, server.cut_after = honours_range, [*cuts]
    _auto(source)
    assert cached.read_bytes() == content
    assert server.ranges == [None, *ranges]


@pytest.mark.parametrize(
    ("kept", "added", "ranges"),
    [(40_000, b"", ["bytes=40000-"]), (0, b"x" * 1000, ["bytes=1000-", None]), (None, b"x", [None]), (None, b"", [])],
    ids=["cut", "other bytes", "too long", "complete"],
)
def test_download_resumes_an_earlier_one(
    *, server: _Server, source: RemoteFile, cached: Path, content: bytes, kept: int, added: bytes, ranges: list[str]
) -> None:
    cached.parent.mkdir(parents=True)
    cached.with_name(cached.name + ".part").write_bytes(content[:kept] + added)
    _auto(source)
    assert cached.read_bytes() == content
    assert server.ranges == ranges


def test_download_refuses_wrong_bytes(server: _Server, source: RemoteFile, cached: Path, content: bytes) -> None:
    server.content = content[:-1] + bytes([content[-1] ^ 1])
    message = _refused(source, cached)
    assert "the server sent other bytes" in message
    assert source.sha256 in message
    assert not list(cached.parent.glob("*.part"))
    with pytest.raises(DownloadError, match=r"^the server sent other bytes"):
        download_file(source, cached, pause=0.0)


def test_download_refuses_another_length(server: _Server, source: RemoteFile, cached: Path, content: bytes) -> None:
    server.content = content + b"more"
    assert "must be" in _refused(source, cached)


def test_download_refuses_another_range(server: _Server, source: RemoteFile, cached: Path, content: bytes) -> None:
    server.cut_after = [1000]
    server.wrong_range = f"bytes 5-{len(content) - 1}/{len(content)}"
    assert "the server sent 'bytes 5-" in _refused(source, cached)


def test_download_without_a_network(source: RemoteFile, cached: Path) -> None:
    with _serving(b"") as closed:
        port = closed.server_address[1]
    message = _refused(replace(source, url=f"http://127.0.0.1:{port}/vgg19.pth"), cached)
    assert "no connection" in message
    assert "after 4 tries" in message


def test_download_keeps_the_bytes_of_a_failed_one(server: _Server, source: RemoteFile, cached: Path) -> None:
    server.cut_after = [1000] + [0] * 10
    message = _refused(source, cached)
    assert "cut after 1,000 of" in message
    assert "1,000 bytes are kept" in message
    assert cached.with_name(cached.name + ".part").stat().st_size == 1000


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (503, 4), (416, 4)])
def test_download_retries_only_what_may_pass(
    server: _Server, source: RemoteFile, cached: Path, status: int, requests: int
) -> None:
    server.status = status
    message = _refused(source, cached)
    assert str(status) in message or status == 416
    assert len(server.ranges) == requests


def test_download_refuses_invalid_addresses(source: RemoteFile, cached: Path) -> None:
    for url in ("file:///etc/passwd", "http://"):
        assert "http://" in _refused(replace(source, url=url), cached)
    assert "is invalid" in _refused(replace(source, url="http://127.0.0.1/ü"), cached)


def test_download_to_a_failing_disk(source: RemoteFile, cached: Path) -> None:
    cached.parent.parent.mkdir()
    cached.parent.write_text("a file instead of the folder")
    with pytest.raises(WeightsUnavailable, match=r"cannot write .*vgg19-test\.pth"):
        _auto(source)


def test_load_vgg19_auto_replaces_a_damaged_file(
    server: _Server, source: RemoteFile, cached: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cached.parent.mkdir(parents=True)
    cached.write_bytes(content[:-5])
    _auto(source)
    assert any(str(cached) in message and "damaged" in message for message in caplog.messages)
    assert cached.read_bytes() == content
    assert len(server.ranges) == 1


def test_load_vgg19_auto_uses_the_copy_of_torch_hub(
    *, server: _Server, source: RemoteFile, cached: Path, content: bytes, tmp_path: Path, caplog: Any
) -> None:
    hub = tmp_path / "torch" / "hub" / "checkpoints" / source.file_name
    hub.parent.mkdir(parents=True)
    hub.write_bytes(content)
    _auto(source)
    assert str(hub) in caplog.messages[-1]
    assert not cached.exists()
    assert server.ranges == []
    hub.write_bytes(content[:-1])
    caplog.clear()
    _auto(source)
    assert str(hub) in caplog.messages[0]
    assert cached.read_bytes() == content
    assert hub.read_bytes() == content[:-1]


def test_load_vgg19_auto_downloads_from_the_mirror_of_the_environment(
    server: _Server, source: RemoteFile, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTNST_VGG19_URL", source.url)
    _auto(replace(source, url="http://127.0.0.1:9/nowhere"))
    assert cached.is_file()
    assert len(server.ranges) == 1


def test_download_file_in_parallel_requests_it_once(server: _Server, source: RemoteFile, cached: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: download_file(source, cached, pause=0.0), range(4)))
    assert server.ranges == [None]
