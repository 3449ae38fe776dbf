"""The network: training opens no connection, TensorBoard listens on localhost, cached weights are checked in full."""

import contextlib
import hashlib
import importlib.util
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastnst.errors import DataError
from fastnst.models import weights as weights_module
from fastnst.models.files.download import DownloadError, RemoteFile
from fastnst.models.vgg19 import VGG19
from fastnst.models.weights import load_vgg19, torchvision_key
from fastnst.run_log.writer import RunLog
from helpers.malformed.files import Call, zipped

# sitecustomize of every Python process in the test environment, workers included.
GUARD = """
import sys

def watch(event, arguments):
    asks = event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
    makes = event == "socket.__new__" and int(arguments[1]) in (2, 10)
    # Local sockets, between processes, have strings for addresses.
    reaches = event in ("socket.connect", "socket.sendto", "socket.bind") and isinstance(arguments[-1], tuple)
    if asks or makes or reaches:
        with open(LOG, "a") as log:
            log.write(f"{sys.argv[:3]} {event} {arguments[1:]}\\n")
        raise ConnectionError(f"{event}: the network is not to be used here")

sys.addaudithook(watch)
with open(LOG, "a") as log:
    log.write("started\\n")
"""


@pytest.fixture
def guarded(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """An environment in which connections fail, and the file that logs them."""
    log, folder = tmp_path / "connections", tmp_path / "guard"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"LOG = {str(log)!r}\n{GUARD}")
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(map(str, (folder, root, root / "kernels")))
    return os.environ | {"PYTHONPATH": path, "FASTNST_CACHE": str(tmp_path / "cache")}, log


def connections(log: Path) -> list[str]:
    lines = log.read_text().splitlines()
    assert "started" in lines
    return [line for line in lines if line != "started"]


def torchvision_state(last_layer: str) -> dict[str, torch.Tensor]:
    """Random weights of VGG19 up to a layer, under torchvision's names."""
    net = VGG19(last_layer, generator=torch.Generator().manual_seed(0))
    parts = ((*name.rpartition(".")[::2], tensor) for name, tensor in net.state_dict().items())
    return {f"{torchvision_key(layer)}.{kind}": tensor.contiguous().clone() for layer, kind, tensor in parts}


def test_train_uses_no_network(guarded: tuple[dict[str, str], Path], photo_folder: Path, tmp_path: Path) -> None:
    environment, log = guarded
    torch.save(torchvision_state("relu3_4"), tmp_path / "vgg19.pth")
    sizes = ("data.image_size=32", "train.batch_size=1", "style.size=32", "train.samples=1", "data.workers=1")
    sizes += ("loss.vgg_flavour=torchvision", "visualize.every=0")
    other_loader = "dali" if importlib.util.find_spec("nvidia.dali") else "pillow"
    runs = (("random", "pillow", 1), (str(tmp_path / "vgg19.pth"), other_loader, 2))
    code = "from fastnst.cli.main import cli\n"
    for vgg, loader, steps in runs:
        command = ["train", "--style", photo_folder / "image_00.jpg", "--data", photo_folder, "--preset", "vgg-conv3"]
        command += ["--loader", loader, "--device", "cpu", "--vgg", vgg, "--steps", steps, "--out", f"run{steps}"]
        command += [part for size in sizes for part in ("--set", size)]
        code += f"cli.main({[str(word) for word in command]}, standalone_mode=False)\n"
    # The Pillow loader's workers import the main module anew: it must be a file, and guarded.
    script = tmp_path / "script.py"
    script.write_text("if __name__ == '__main__':\n    " + code.replace("\n", "\n    ").rstrip() + "\n")
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("run*/model.safetensors"))) == 2
    assert connections(log) == []


@pytest.mark.parametrize(
    "code",
    [
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9', timeout=1)",
        "import socket; socket.getaddrinfo('example.invalid', 80)",
        "import socket; socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
    ],
)
def test_guard_sees_a_connection(guarded: tuple[dict[str, str], Path], code: str) -> None:
    environment, log = guarded
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False, timeout=60)
    assert done.returncode != 0
    assert connections(log) != []


def test_guard_sees_the_download_of_weights(guarded: tuple[dict[str, str], Path], tmp_path: Path) -> None:
    environment, log = guarded
    code = "from fastnst.models.weights import load_vgg19\n"
    code += "load_vgg19('auto', last_layer='relu1_1', pause=0.0)"
    environment |= {"TORCH_HOME": str(tmp_path), "FASTNST_VGG19_URL": "http://127.0.0.1:9/vgg19.pth"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False, timeout=120)
    assert b"WeightsUnavailable" in done.stderr
    assert connections(log) != []


def listening(process: int) -> set[str]:
    """Return the addresses on which a process listens, from /proc."""
    inodes = set()
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            if found := re.fullmatch(r"socket:\[(\d+)\]", str(descriptor.readlink())):
                inodes.add(found[1])
    addresses = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                words = re.findall(".{8}", fields[1].partition(":")[0])
                packed = b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
                addresses.add(socket.inet_ntop(family, packed))
    return addresses


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), {"127.0.0.1", "::1"}), (("--host", "0.0.0.0"), {"0.0.0.0"})],
    ids=["localhost", "asked"],
)
def test_tensorboard_listens_on_the_asked_host(tmp_path: Path, options: tuple[str, ...], expected: set[str]) -> None:
    with RunLog(tmp_path) as log:
        log.metrics(0, {"loss/total": 1.0})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fastnst", "tensorboard", str(tmp_path), "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline, found = time.monotonic() + 120, set[str]()
        while not found and time.monotonic() < deadline:
            assert process.poll() is None, f"TensorBoard ended with code {process.returncode}"
            found = listening(process.pid)
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
    assert found
    assert found <= expected


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, RemoteFile]:
    """VGG19's first layers where a download would have put them, and what is known of them."""
    monkeypatch.setenv("FASTNST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    path = tmp_path / "cache" / "weights" / "vgg.pth"
    path.parent.mkdir(parents=True)
    torch.save(torchvision_state("relu1_2"), path)
    data = path.read_bytes()
    return path, RemoteFile("http://127.0.0.1:9/", hashlib.sha256(data).hexdigest(), len(data), path.name)


def test_load_vgg19_checks_cached_weights_at_every_load(
    cached: tuple[Path, RemoteFile], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, source = cached

    def no_network(*_: object, **__: object) -> None:
        raise DownloadError("no network")

    monkeypatch.setattr(weights_module, "download_file", no_network)
    whole, status = path.read_bytes(), path.stat()
    for place in (0, len(whole) // 2, len(whole) - 1):
        load_vgg19("auto", last_layer="relu1_2", source=source)
        damaged = bytearray(whole)
        damaged[place] ^= 1
        # Size and time stay the same; only the content differs.
        path.write_bytes(damaged)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        caplog.clear()
        with pytest.raises(DataError):
            load_vgg19("auto", last_layer="relu1_2", source=source)
        assert any("is damaged" in line for line in caplog.messages)
        path.write_bytes(whole)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_load_vgg19_refuses_nan_and_inf(tmp_path: Path, suffix: str, value: float) -> None:
    state = torchvision_state("relu1_2")
    state["features.2.bias"][-1] = value
    path = tmp_path / f"vgg{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with pytest.raises(DataError, match="not finite numbers"):
        load_vgg19(str(path), last_layer="relu1_2", flavour="caffe")


def test_load_vgg19_runs_no_payload_even_without_vetting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "check_torch_file", lambda _: None)
    canary, path = tmp_path / "canary", tmp_path / "vgg.pth"
    path.write_bytes(zipped(pickle.dumps(Call(os.system, f"touch {canary}"), 2)))
    with pytest.raises(DataError):
        load_vgg19(str(path), last_layer="relu1_1")
    assert not canary.exists()
