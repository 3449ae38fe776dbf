"""Loading VGG19: files of every kind, the flavour told from content, and downloads over a server that misbehaves."""

import hashlib
import os
import pickle
import threading
from collections.abc import Iterator
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
from fastnst.models.download import DownloadError, Source, fetch
from fastnst.models.vgg19 import VGG19, WEIGHT_SHAPES
from fastnst.models.weights import TORCHVISION, WeightsUnavailable, describe_source, load_vgg19, torchvision_key

TORCHVISION_KERNEL = [-0.053474, -0.049257, -0.067942, 0.015314, 0.045068, 0.0021444, 0.036226, 0.019999, 0.019864]


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


def _load(spec: str, last_layer: str = "relu2_1", **options: Any) -> tuple[VGG19, list[str]]:
    messages: list[str] = []
    options.setdefault("progress", lambda _done, _all: None)
    return load_vgg19(spec, last_layer=last_layer, notify=messages.append, pause=0.0, **options), messages


def _same_weights(net: VGG19, state: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(parameter, state[f"{torchvision_key(name.partition('.')[0])}.{name.partition('.')[2]}"])
        for name, parameter in net.named_parameters()
    )


@pytest.mark.parametrize("name", ["vgg19.pth", "vgg19.safetensors"])
def test_files_of_either_format(tmp_path: Path, name: str) -> None:
    state = _state()
    net, messages = _load(_file(tmp_path, state, name))
    assert _same_weights(net, state)
    assert net.flavour == "torchvision"
    assert net.last_layer == "relu2_1"
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert messages == [
        f"VGG19: {tmp_path / name} up to relu2_1, torchvision flavour (conv1_1 is torchvision's)",
    ]


def test_the_older_format_of_torch_which_torchvision_still_serves(tmp_path: Path) -> None:
    state = _state()
    net, _ = _load(_file(tmp_path, state, _use_new_zipfile_serialization=False))
    assert _same_weights(net, state)


def test_a_checkpoint_that_wraps_the_weights(tmp_path: Path) -> None:
    state = _state()
    assert _same_weights(_load(_file(tmp_path, {"state_dict": state, "epoch": 3}))[0], state)


def test_a_deeper_file_and_half_precision_are_welcome(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in _state("relu3_1").items()}
    net, _ = _load(_file(tmp_path, state), "relu1_2")
    assert net.flavour == "torchvision"
    assert net.conv1_2.weight.dtype == torch.float32
    assert torch.equal(net.conv1_2.weight, state["features.2.weight"].float())


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    path = _file(tmp_path, _state())
    before = torch.get_rng_state()
    for spec in (path, "random"):
        _load(spec)
    assert torch.equal(before, torch.get_rng_state())


def test_real_caffe_weights_are_known_by_their_content(weights: Path, tmp_path: Path) -> None:
    link = tmp_path / "torchvision_vgg19.pth"
    link.symlink_to(weights / "vgg19_caffe_conv1_1-conv3_4.pth")
    net, messages = _load(str(link), "relu3_4")
    assert net.flavour == "caffe"
    assert "conv1_1 is the original of Oxford" in messages[0]


def test_a_flavour_that_cannot_be_told(tmp_path: Path) -> None:
    path = _file(tmp_path, _state(kernel=None), "vgg19_caffe.pth")
    with pytest.raises(
        DataError, match=r"cannot be told.*--set loss\.vgg_flavour=torchvision or --set loss\.vgg_flavour=caffe"
    ):
        _load(path)
    net, messages = _load(path, flavour="caffe")
    assert net.flavour == "caffe"
    assert "as loss.vgg_flavour says" in messages[0]


def test_swapped_channels_are_no_known_flavour(tmp_path: Path) -> None:
    state = _state()
    state["features.0.weight"] = state["features.0.weight"].flip(1).contiguous()
    with pytest.raises(DataError, match="cannot be told"):
        _load(_file(tmp_path, state))


def test_a_known_checksum_tells_the_flavour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file(tmp_path, _state(kernel=None))
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    monkeypatch.setattr(weights_module, "_KNOWN_DIGESTS", {digest[:8]: "caffe"})
    assert _load(path)[0].flavour == "caffe"


def test_metadata_tells_the_flavour(tmp_path: Path) -> None:
    state = _state()
    assert _load(_file(tmp_path, state, "a.safetensors", metadata={"flavour": "caffe"}))[0].flavour == "caffe"
    with pytest.raises(DataError, match="'keras'"):
        _load(_file(tmp_path, state, "b.safetensors", metadata={"flavour": "keras"}))


def test_too_few_layers(tmp_path: Path) -> None:
    path = _file(tmp_path, _state("relu2_1"))
    with pytest.raises(DataError, match=r"lacks conv2_2, conv3_1, which relu3_1 needs; choose .* up to relu2_1"):
        _load(path, "relu3_1")
    state = _state("relu2_1")
    del state["features.2.bias"]
    with pytest.raises(DataError, match=r"lacks conv1_2, which relu2_1 needs; choose loss layers up to relu1_1"):
        _load(_file(tmp_path, state))


def test_other_networks(tmp_path: Path) -> None:
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
def test_damaged_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    whole = Path(_file(tmp_path, _state(), "whole" + path.suffix)).read_bytes()
    for content in (b"", b"a text file, not weights", whole[: len(whole) // 2], whole[:100]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is damaged or no weights file") as caught:
            _load(str(path))
        assert str(path) in str(caught.value)
        assert str(caught.value).count("\n") <= 1


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    path = tmp_path / "vgg19.pth"
    path.write_bytes(pickle.dumps(_Command()))
    with pytest.raises(DataError, match="is damaged or no weights file"):
        _load(str(path))
    with pytest.raises(DataError, match="no dictionary of tensors"):
        _load(_file(tmp_path, [torch.zeros(3)]))
    state = _state()
    state["features.2.weight"][5, 5, 1, 1] = float("nan")
    with pytest.raises(DataError, match=r"features\.2\.weight \(conv1_2\) holds values that are no finite numbers"):
        _load(_file(tmp_path, state))
    with pytest.raises(DataError, match="No such file"):
        _load(str(tmp_path / "absent.pth"))
    with pytest.raises(DataError, match="are a folder"):
        _load(str(tmp_path))


def test_random_weights_are_seeded_and_announced() -> None:
    (first, messages), (second, _), (other, _) = (_load("random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.conv2_1.weight, second.conv2_1.weight)
    assert not torch.equal(first.conv2_1.weight, other.conv2_1.weight)
    assert first.flavour == "torchvision"
    assert _load("random", flavour="caffe")[0].flavour == "caffe"
    assert len(messages) == 1
    assert "RANDOM" in messages[0]
    assert "--vgg FILE" in messages[0]


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="did you mean 'relu4_2'"):
        _load("random", "relu4_22")
    with pytest.raises(UserError, match="auto, torchvision, caffe"):
        _load("random", flavour="tensorflow")


def test_key_names_are_torchvisions() -> None:
    assert torchvision_key("conv1_1") == "features.0"
    assert torchvision_key("conv3_4") == "features.16"
    assert torchvision_key("conv5_4") == "features.34"
    assert torchvision_key("fc8") == "classifier.6"
    assert len({torchvision_key(layer) for layer in WEIGHT_SHAPES}) == 19


class _Server(ThreadingHTTPServer):
    """Serves one file, resumably, unless told otherwise; keeps the Range header of each request."""

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
        """Say nothing on stderr."""


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


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """A small VGG19 file, a few hundred kilobytes."""
    return Path(_file(tmp_path, _state("relu1_2"), "served.pth")).read_bytes()


@pytest.fixture
def server(content: bytes) -> Iterator[_Server]:
    with _serving(content) as server:
        yield server


@pytest.fixture
def source(server: _Server, content: bytes) -> Source:
    url = f"http://127.0.0.1:{server.server_address[1]}/vgg19.pth"
    return Source(url, hashlib.sha256(content).hexdigest(), len(content), "vgg19-test.pth")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the download is to lie; caches of the machine are out of sight."""
    monkeypatch.setenv("FASTNST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "cache" / "weights" / "vgg19-test.pth"


def _auto(source: Source, **options: Any) -> tuple[VGG19, list[str]]:
    return _load("auto", "relu1_2", source=source, **options)


def test_auto_downloads_once(server: _Server, source: Source, cached: Path, content: bytes) -> None:
    seen: list[tuple[int, int]] = []
    net, messages = _auto(source, progress=lambda done, total: seen.append((done, total)))
    assert net.flavour == "torchvision"
    assert cached.read_bytes() == content
    assert seen[-1] == (len(content), len(content))
    assert seen == sorted(seen)
    assert any(f"downloading {source.url}" in message for message in messages)
    assert not list(cached.parent.glob("*.part"))
    _, messages = _auto(source)
    assert len(server.ranges) == 1
    assert messages == [f"VGG19: {cached} up to relu1_2, torchvision flavour (its SHA-256 is right)"]


def test_a_bar_shows_the_download_where_no_progress_is_asked_for(
    source: Source, cached: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _auto(source, progress=None)
    assert cached.is_file()
    assert "download VGG19" in capsys.readouterr().err


def test_a_cut_connection_is_resumed(server: _Server, source: Source, cached: Path, content: bytes) -> None:
    server.cut_after = [30_000, 20_000]
    _auto(source)
    assert cached.read_bytes() == content
    assert server.ranges == [None, "bytes=30000-", "bytes=50000-"]


def test_a_later_run_goes_on_where_an_earlier_one_was_cut(
    server: _Server, source: Source, cached: Path, content: bytes
) -> None:
    cached.parent.mkdir(parents=True)
    cached.with_name(cached.name + ".part").write_bytes(content[:40_000])
    _auto(source)
    assert cached.read_bytes() == content
    assert server.ranges == ["bytes=40000-"]


@pytest.mark.parametrize("leftover", ["other bytes", "too long", "complete"])
def test_what_an_earlier_download_left(
    server: _Server, source: Source, cached: Path, content: bytes, leftover: str
) -> None:
    cached.parent.mkdir(parents=True)
    left = {"other bytes": b"x" * 1000, "too long": content + b"x", "complete": content}[leftover]
    cached.with_name(cached.name + ".part").write_bytes(left)
    _auto(source)
    assert cached.read_bytes() == content
    assert server.ranges == {"other bytes": ["bytes=1000-", None], "too long": [None], "complete": []}[leftover]


def test_a_server_that_ignores_range(server: _Server, source: Source, cached: Path, content: bytes) -> None:
    server.honours_range = False
    server.cut_after = [30_000]
    _auto(source)
    assert cached.read_bytes() == content
    assert server.ranges == [None, "bytes=30000-"]


def _fails(source: Source, cached: Path) -> str:
    with pytest.raises(WeightsUnavailable) as caught:
        _auto(source)
    assert not cached.exists()
    message = str(caught.value)
    assert len(message.splitlines()) == 2
    for part in (source.url, "--vgg FILE", "--vgg random", str(cached)):
        assert part in message
    return message


def test_wrong_bytes(server: _Server, source: Source, cached: Path, content: bytes) -> None:
    server.content = content[:-1] + bytes([content[-1] ^ 1])
    message = _fails(source, cached)
    assert "other bytes" in message
    assert source.sha256 in message
    assert not list(cached.parent.glob("*.part"))


def test_another_file_of_another_length(server: _Server, source: Source, cached: Path, content: bytes) -> None:
    server.content = content + b"more"
    assert "must be" in _fails(source, cached)


def test_a_range_that_was_not_asked_for(server: _Server, source: Source, cached: Path, content: bytes) -> None:
    server.cut_after = [1000]
    server.wrong_range = f"bytes 5-{len(content) - 1}/{len(content)}"
    assert "the server sent 'bytes 5-" in _fails(source, cached)


def test_no_network(source: Source, cached: Path) -> None:
    with _serving(b"") as closed:
        port = closed.server_address[1]
    message = _fails(replace(source, url=f"http://127.0.0.1:{port}/vgg19.pth"), cached)
    assert "no connection" in message
    assert "after 4 tries" in message


def test_a_connection_that_is_cut_again_and_again(server: _Server, source: Source, cached: Path) -> None:
    server.cut_after = [1000] + [0] * 10
    message = _fails(source, cached)
    assert "cut after 1,000 of" in message
    assert "1,000 bytes are kept" in message
    assert cached.with_name(cached.name + ".part").stat().st_size == 1000


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, 4), (416, 4)])
def test_refusals(server: _Server, source: Source, cached: Path, status: int, requests: int) -> None:
    server.status = status
    message = _fails(source, cached)
    assert str(status) in message or status == 416
    assert len(server.ranges) == requests


def test_addresses_that_are_none(source: Source, cached: Path) -> None:
    assert "http://" in _fails(replace(source, url="file:///etc/passwd"), cached)
    assert "http://" in _fails(replace(source, url="http://"), cached)
    assert "cannot be used" in _fails(
        replace(source, url="http://127.0.0.1/\N{LATIN SMALL LETTER U WITH DIAERESIS}"), cached
    )


def test_a_disk_that_refuses(source: Source, cached: Path) -> None:
    cached.parent.parent.mkdir()
    cached.parent.write_text("a file where the folder should be")
    with pytest.raises(WeightsUnavailable, match=r"cannot write .*vgg19-test\.pth"):
        _auto(source)


def test_a_damaged_cached_file_is_named_and_replaced(
    server: _Server, source: Source, cached: Path, content: bytes
) -> None:
    cached.parent.mkdir(parents=True)
    cached.write_bytes(content[:-5])
    _, messages = _auto(source)
    assert any(str(cached) in message and "damaged" in message for message in messages)
    assert cached.read_bytes() == content
    assert len(server.ranges) == 1


def test_torch_hubs_copy_is_used(server: _Server, source: Source, cached: Path, content: bytes, tmp_path: Path) -> None:
    hub = tmp_path / "torch" / "hub" / "checkpoints" / source.file_name
    hub.parent.mkdir(parents=True)
    hub.write_bytes(content)
    _, messages = _auto(source)
    assert str(hub) in messages[-1]
    assert not cached.exists()
    assert server.ranges == []
    hub.write_bytes(content[:-1])
    _, messages = _auto(source)
    assert str(hub) in messages[0]
    assert cached.read_bytes() == content
    assert hub.read_bytes() == content[:-1]


def test_a_mirror_from_the_environment(
    server: _Server, source: Source, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTNST_VGG19_URL", source.url)
    _auto(replace(source, url="http://127.0.0.1:9/nowhere"))
    assert cached.is_file()
    assert len(server.ranges) == 1


def test_parallel_processes_download_once(server: _Server, source: Source, cached: Path) -> None:
    errors: list[BaseException] = []

    def one() -> None:
        try:
            fetch(source, cached, pause=0.0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert server.ranges == [None]


def test_fetch_says_the_reason_alone(source: Source, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"^the server sent other bytes"):
        fetch(replace(source, sha256="0" * 64), tmp_path / "file", pause=0.0)


def test_where_the_weights_would_come_from(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
