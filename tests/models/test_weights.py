"""Loading VGG19: files of every kind, flavour detection, and downloads from a faulty server."""

import hashlib
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastnst.errors import DataError, UserError
from fastnst.models import weights as weights_module
from fastnst.models.download import DownloadError, RemoteFile, download_file
from fastnst.models.vgg19 import VGG19, WEIGHT_SHAPES
from fastnst.models.weights import TORCHVISION, WeightsUnavailable, describe_source, load_vgg19, torchvision_key

TORCHVISION_KERNEL = [-0.053474, -0.049257, -0.067942, 0.015314, 0.045068, 0.0021444, 0.036226, 0.019999, 0.019864]


@pytest.fixture(autouse=True)
def _log_messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastnst")


def _state(last_layer: str = "relu2_1", *, kernel: list[float] | None = TORCHVISION_KERNEL) -> dict[str, Tensor]:
    """A VGG19 under torchvision's key names, with `kernel` as conv1_1's first."""
    net = VGG19(last_layer, generator=torch.Generator().manual_seed(3))
    state = {}
    for name, tensor in net.state_dict().items():
        layer, _, kind = name.partition(".")
        state[f"{torchvision_key(layer)}.{kind}"] = tensor.contiguous().clone()
    if kernel is not None:
        state["features.0.weight"][0, 0] = torch.tensor(kernel).view(3, 3)
    return state


def _file(folder: Path, state: Any, name: str = "vgg19.pth", **options: Any) -> str:
    path = folder / name
    if path.suffix == ".safetensors":
        save_file(state, path, **options)
    else:
        torch.save(state, path, **options)
    return str(path)


def _load(spec: str, last_layer: str = "relu2_1", **options: Any) -> VGG19:
    return load_vgg19(spec, last_layer=last_layer, pause=0.0, **options)


def _same_weights(net: VGG19, state: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(parameter, state[f"{torchvision_key(name.partition('.')[0])}.{name.partition('.')[2]}"])
        for name, parameter in net.named_parameters()
    )


# Files.


@pytest.mark.parametrize("name", ["vgg19.pth", "vgg19.safetensors"])
def test_load_vgg19_reads_either_format(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    state = _state()
    random_state = torch.get_rng_state()
    net = _load(_file(tmp_path, state, name))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert _same_weights(net, state)
    assert (net.flavour, net.last_layer) == ("torchvision", "relu2_1")
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert caplog.messages == [
        f"VGG19: {tmp_path / name} up to relu2_1, torchvision flavour (conv1_1 is torchvision's)"
    ]


def test_load_vgg19_reads_the_older_torch_format_and_checkpoints(tmp_path: Path) -> None:
    state = _state()
    assert _same_weights(_load(_file(tmp_path, state, _use_new_zipfile_serialization=False)), state)
    assert _same_weights(_load(_file(tmp_path, {"state_dict": state, "epoch": 3})), state)


def test_load_vgg19_reads_deeper_files_in_half_precision(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in _state("relu3_1").items()}
    net = _load(_file(tmp_path, state), "relu1_2")
    assert net.flavour == "torchvision"
    assert net.conv1_2.weight.dtype == torch.float32
    assert torch.equal(net.conv1_2.weight, state["features.2.weight"].float())


def test_flavour_of_real_caffe_weights(weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    link = tmp_path / "torchvision_vgg19.pth"
    link.symlink_to(weights / "vgg19_caffe_conv1_1-conv3_4.pth")
    assert _load(str(link), "relu3_4").flavour == "caffe"
    assert "conv1_1 is the original of Oxford" in caplog.text


def test_flavour_by_metadata(tmp_path: Path) -> None:
    state = _state()
    assert _load(_file(tmp_path, state, "a.safetensors", metadata={"flavour": "caffe"})).flavour == "caffe"
    with pytest.raises(DataError, match="'keras'"):
        _load(_file(tmp_path, state, "b.safetensors", metadata={"flavour": "keras"}))


def test_flavour_of_unknown_weights_by_option_or_checksum(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _file(tmp_path, _state(kernel=None), "vgg19_caffe.pth")
    with pytest.raises(
        DataError, match=r"cannot tell.*--set loss\.vgg_flavour=torchvision or --set loss\.vgg_flavour=caffe"
    ):
        _load(path)
    assert _load(path, flavour="caffe").flavour == "caffe"
    assert "as loss.vgg_flavour says" in caplog.text
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    monkeypatch.setattr(weights_module, "_KNOWN_DIGESTS", {digest[:8]: "caffe"})
    assert _load(path).flavour == "caffe"
    swapped = _state()
    swapped["features.0.weight"] = swapped["features.0.weight"].flip(1).contiguous()
    with pytest.raises(DataError, match="cannot tell"):
        _load(_file(tmp_path, swapped))


def test_load_vgg19_refuses_files_with_too_few_layers(tmp_path: Path) -> None:
    path = _file(tmp_path, _state("relu2_1"))
    with pytest.raises(DataError, match=r"lacks conv2_2, conv3_1, which relu3_1 needs; choose .* up to relu2_1"):
        _load(path, "relu3_1")
    state = _state("relu2_1")
    del state["features.2.bias"]
    with pytest.raises(DataError, match=r"lacks conv1_2, which relu2_1 needs; choose loss layers up to relu1_1"):
        _load(_file(tmp_path, state))


def test_load_vgg19_refuses_other_networks(tmp_path: Path) -> None:
    def another(key: str, *shape: int) -> str:
        return _file(tmp_path, {**_state(), key: torch.zeros(shape)})

    with pytest.raises(DataError, match=r"another network than VGG19: features\.17\.weight .*no such tensor"):
        _load(another("features.17.weight", 512, 256, 3, 3))  # VGG16
    with pytest.raises(DataError, match=r"features\.0\.weight is \[64, 3, 11, 11\]"):
        _load(another("features.0.weight", 64, 3, 11, 11))  # AlexNet
    with pytest.raises(DataError, match=r"torchvision's key names.*but conv1\.weight"):
        _load(_file(tmp_path, {"conv1.weight": torch.zeros(64, 3, 7, 7)}))  # ResNet
    with pytest.raises(DataError, match="but nothing"):
        _load(_file(tmp_path, {}))


class _Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


@pytest.mark.parametrize("name", ["vgg19.pth", "vgg19.safetensors"])
def test_load_vgg19_refuses_damaged_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    whole = Path(_file(tmp_path, _state(), "whole" + path.suffix)).read_bytes()
    for content in (b"", b"a text file, not weights", pickle.dumps(_Command()), whole[: len(whole) // 2], whole[:100]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is damaged or no weights file") as caught:
            _load(str(path))
        assert str(path) in str(caught.value)
        assert str(caught.value).count("\n") <= 1


def test_load_vgg19_refuses_other_content(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dictionary of tensors"):
        _load(_file(tmp_path, [torch.zeros(3)]))
    state = _state()
    state["features.2.weight"][5, 5, 1, 1] = float("nan")
    with pytest.raises(DataError, match=r"features\.2\.weight \(conv1_2\) holds values that are not finite numbers"):
        _load(_file(tmp_path, state))
    with pytest.raises(DataError, match="No such file"):
        _load(str(tmp_path / "absent.pth"))
    with pytest.raises(DataError, match="are a folder"):
        _load(str(tmp_path))
    with pytest.raises(UserError, match="did you mean 'relu4_2'"):
        _load("random", "relu4_22")
    with pytest.raises(UserError, match="auto, torchvision, caffe"):
        _load("random", flavour="tensorflow")


def test_random_weights_are_seeded_and_announced(caplog: pytest.LogCaptureFixture) -> None:
    random_state = torch.get_rng_state()
    first, second, other = (_load("random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(first.conv2_1.weight, second.conv2_1.weight)
    assert not torch.equal(first.conv2_1.weight, other.conv2_1.weight)
    assert first.flavour == "torchvision"
    assert _load("random", flavour="caffe").flavour == "caffe"
    assert len(caplog.messages) == 4
    assert caplog.records[0].levelname == "WARNING"
    assert "RANDOM" in caplog.messages[0]
    assert "--vgg FILE" in caplog.messages[0]


def test_torchvision_key() -> None:
    assert [torchvision_key(layer) for layer in ("conv1_1", "conv3_4", "conv5_4", "fc8")] == [
        *("features.0", "features.16", "features.34", "classifier.6")
    ]
    assert len({torchvision_key(layer) for layer in WEIGHT_SHAPES}) == 19


# Downloads.


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
    return Path(_file(tmp_path_factory.mktemp("served"), _state("relu1_2"))).read_bytes()


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
    return _load("auto", "relu1_2", source=source)


def _refused(source: RemoteFile, cached: Path) -> str:
    with pytest.raises(WeightsUnavailable) as caught:
        _auto(source)
    assert not cached.exists()
    message = str(caught.value)
    assert len(message.splitlines()) == 2
    for part in (source.url, "--vgg FILE", "--vgg random", str(cached)):
        assert part in message
    return message


def test_auto_downloads_once(
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


def test_download_resumes_a_cut_connection(server: _Server, source: RemoteFile, cached: Path, content: bytes) -> None:
    server.cut_after = [30_000, 20_000]
    _auto(source)
    assert cached.read_bytes() == content
    assert server.ranges == [None, "bytes=30000-", "bytes=50000-"]


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


def test_download_from_a_server_that_ignores_range(
    server: _Server, source: RemoteFile, cached: Path, content: bytes
) -> None:
    server.honours_range = False
    server.cut_after = [30_000]
    _auto(source)
    assert cached.read_bytes() == content
    assert server.ranges == [None, "bytes=30000-"]


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
    assert "http://" in _refused(replace(source, url="file:///etc/passwd"), cached)
    assert "http://" in _refused(replace(source, url="http://"), cached)
    assert "is invalid" in _refused(replace(source, url="http://127.0.0.1/ü"), cached)


def test_download_to_a_failing_disk(source: RemoteFile, cached: Path) -> None:
    cached.parent.parent.mkdir()
    cached.parent.write_text("a file instead of the folder")
    with pytest.raises(WeightsUnavailable, match=r"cannot write .*vgg19-test\.pth"):
        _auto(source)


def test_auto_replaces_a_damaged_file(
    server: _Server, source: RemoteFile, cached: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cached.parent.mkdir(parents=True)
    cached.write_bytes(content[:-5])
    _auto(source)
    assert any(str(cached) in message and "damaged" in message for message in caplog.messages)
    assert cached.read_bytes() == content
    assert len(server.ranges) == 1


def test_auto_uses_the_copy_of_torch_hub(
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


def test_auto_downloads_from_the_mirror_of_the_environment(
    server: _Server, source: RemoteFile, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTNST_VGG19_URL", source.url)
    _auto(replace(source, url="http://127.0.0.1:9/nowhere"))
    assert cached.is_file()
    assert len(server.ranges) == 1


def test_parallel_downloads_request_the_file_once(server: _Server, source: RemoteFile, cached: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: download_file(source, cached, pause=0.0), range(4)))
    assert server.ranges == [None]


def test_describe_source(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "random" in describe_source("random")
    path = tmp_path / "vgg19.pth"
    with pytest.raises(DataError, match="No such file"):
        describe_source(str(path))
    path.write_bytes(b"x" * 2_500_000)
    assert describe_source(str(path)) == f"{path}, 2.5 MB"
    assert describe_source("auto") == f"to be downloaded from {TORCHVISION.url}, 574.7 MB"
    monkeypatch.setenv("FASTNST_VGG19_URL", "http://mirror/vgg")
    assert "http://mirror/vgg" in describe_source("auto")
    ours = cached.with_name(TORCHVISION.file_name)
    ours.parent.mkdir(parents=True)
    with ours.open("wb") as file:
        file.truncate(TORCHVISION.size)
    assert describe_source("auto") == str(ours)
