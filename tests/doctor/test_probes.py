"""Probes of `fastnst doctor` for packages, containers, disks and weights, on this machine and on faked ones."""

import errno
import fcntl
import hashlib
import multiprocessing
import socket
import sys
import tempfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastnst.doctor import host, installation, storage
from fastnst.models import weights as weights_module
from helpers.doctor.machines import row_of

# Packages.


def test_probe_packages_compares_versions_with_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    pin = ["triton==0.0.1; platform_system == 'Linux'", "triton==9; extra == 'no'", "jinja2"]
    monkeypatch.setattr(installation, "_requires", lambda _: pin)
    requires = ["pillow>=1", "numpy>=99", "no-such-thing>=1", "captum>=0.8; extra == 'test'", "click; os_name == 'x'"]
    own = SimpleNamespace(metadata={"Requires-Python": ">=99"}, requires=requires)
    monkeypatch.setattr(metadata, "distribution", lambda _: own)
    monkeypatch.setattr(installation, "_version", lambda name: {"no-such-thing": None}.get(name, "1.5"))
    found = installation.probe_packages()
    assert (found["requires_python"], found["python_fits"]) == (">=99", False)
    assert (found["triton_pin"], found["triton_pairs"]) == ("==0.0.1", False)
    assert found["packages"] == {
        "pillow": {"version": "1.5", "wanted": ">=1", "fits": True, "needed": True},
        "numpy": {"version": "1.5", "wanted": ">=99", "fits": False, "needed": True},
        "no-such-thing": {"version": None, "wanted": ">=1", "fits": False, "needed": True},
        "click": {"version": "1.5", "wanted": "", "fits": True, "needed": False},
    }


def test_probe_packages_of_a_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr(metadata, "requires", missing)
    found = installation.probe_packages()
    assert found["fastnst"] is None
    assert found["packages"] == {}
    assert row_of("packages", packages=found).status == "WARN"


@pytest.mark.parametrize(
    ("server", "why"), [(None, "does not exist for this platform"), ("/bin/false", "non-zero exit status 1")]
)
def test_probe_tensorboard_without_data_server(monkeypatch: pytest.MonkeyPatch, server: str | None, why: str) -> None:
    fake = SimpleNamespace(server_binary=lambda: server)
    monkeypatch.setitem(sys.modules, "tensorboard_data_server", fake)
    found = installation.probe_tensorboard()
    assert found["server"] is None
    assert why in found["why"]


# Containers.


CGROUP_V2 = {
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/memory.max": "8589934592\n",
    "sys/fs/cgroup/memory.current": "6442450944\n",
    "sys/fs/cgroup/memory.stat": "anon 100\ninactive_file 1073741824\n",
    "sys/fs/cgroup/cpu.max": "150000 100000\n",
}
CGROUP_V2_NESTED = {
    "proc/self/cgroup": "0::/slice/job/step\n",
    "sys/fs/cgroup/slice/job/step/memory.max": "max\n",
    "sys/fs/cgroup/slice/job/step/memory.current": "1\n",
    "sys/fs/cgroup/slice/job/memory.max": "4294967296\n",
    "sys/fs/cgroup/slice/job/memory.current": "5294967296\n",
    "sys/fs/cgroup/slice/job/cpu.max": "max 100000\n",
}
CGROUP_V1 = {
    "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu:/docker/abc\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
    "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "2147483648\n",
    "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": "1073741824\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "50000\n",
    "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({}, (None, 32 * 2**30, None)),
        (CGROUP_V2, (8 * 2**30, 3 * 2**30, 1.5)),
        (CGROUP_V2_NESTED, (4 * 2**30, 0, None)),
        (CGROUP_V1, (2 * 2**30, 2**30, 0.5)),
    ],
    ids=["none", "v2", "nested", "v1"],
)
def test_probe_host_reads_control_groups(tmp_path: Path, files: dict[str, str], limits: tuple[Any, ...]) -> None:
    memory = "MemTotal:       67108864 kB\nMemAvailable:   33554432 kB\nHugePages_Total:       0\n"
    for name, text in {"proc/meminfo": memory, **files}.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    found = host.probe_host(tmp_path)
    assert found["memory"] == 64 * 2**30
    assert (found["limit"], found["available"], found["quota"]) == limits


def test_probe_shared_memory_without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert "broken" not in host.probe_shared_memory()
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: SimpleNamespace(Lock=no_lock))
    assert "No space left" in host.probe_shared_memory()["broken"]


# Folders and weights.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTNST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("FASTNST_VGG19_URL", raising=False)
    return tmp_path / "cache"


def test_probe_folders_writes_to_the_cache_and_leaves_it_unchanged(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = storage.probe_folders()
    assert (found["cache"], found["cache_exists"], found["cache_refused"]) == (str(cache), False, None)
    assert not cache.exists()
    cache.mkdir()
    found = storage.probe_folders()
    assert (found["cache_exists"], found["cache_refused"]) == (True, None)
    assert found["cache_free"] > 0
    assert list(cache.iterdir()) == []

    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert storage.probe_folders()["cache_refused"] == "Read-only file system"


def test_missing_operations_names_what_a_file_system_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    assert storage.missing_operations(tmp_path) == []
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert storage.missing_operations(tmp_path) == ["locks: No locks available"]
    assert list(tmp_path.iterdir()) == []


def test_probe_folders_with_a_cache_below_a_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file")
    assert "Not a directory" in storage.probe_folders()["cache_refused"]
    monkeypatch.setenv("FASTNST_CACHE", str(cache / "deep" / "er"))
    assert storage.probe_folders()["cache_refused"] == "it does not exist and cannot be created"


def test_probe_folders_without_a_home_names_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTNST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("fastnst.storage.cache.home_folder", lambda: None)
    assert storage.probe_folders()["cache"] is None


@pytest.fixture
def content(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Bytes that stand for VGG19's weights, without a network."""

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("fastnst doctor used the network")

    content = b"the weights" * 100
    small = replace(weights_module.TORCHVISION, sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    monkeypatch.setattr(weights_module, "TORCHVISION", small)
    monkeypatch.setattr(socket, "socket", no_network)
    return content


def test_probe_weights_hashes_every_file(
    cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = weights_module.TORCHVISION.file_name
    own, hub = cache / "weights" / name, tmp_path / "torch" / "hub" / "checkpoints" / name

    def row() -> Any:
        return row_of("VGG19 weights", weights=storage.probe_weights())

    assert row().status == "WARN"
    assert weights_module.TORCHVISION.url in row().fix
    monkeypatch.setenv("FASTNST_VGG19_URL", "https://secret.example/vgg")
    assert "secret" not in row().fix
    assert '"$FASTNST_VGG19_URL"' in row().fix
    own.parent.mkdir(parents=True)
    Path(f"{own}.part").write_bytes(content[:100])
    assert storage.probe_weights()["part"] == 100
    own.write_bytes(content)
    assert row().status == "PASS"
    own.write_bytes(content[:-1] + b"!")  # one byte, the last, and the size is right
    assert row().status == "FAIL"
    assert "SHA-256" in row().found
    hub.parent.mkdir(parents=True)
    hub.write_bytes(content)
    assert row().status == "WARN"
    assert str(hub) in row().found
    own.unlink()
    assert row().status == "PASS"


def test_probe_weights_unreadable(cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(_: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    own = cache / "weights" / weights_module.TORCHVISION.file_name
    own.parent.mkdir(parents=True)
    own.write_bytes(content)
    monkeypatch.setattr("fastnst.storage.sha256_of", unreadable)
    row = row_of("VGG19 weights", weights=storage.probe_weights())
    assert row.status == "FAIL"
    assert "cannot be read: Input/output error" in row.found
