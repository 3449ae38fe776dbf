"""Probes of `fastnst doctor` for drivers, GPUs, kernels and decoders, on this machine and on faked ones."""

import contextlib
import ctypes
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import features

import fastnst_kernels
from fastnst.doctor import device, images
from helpers.doctor.machines import row_of

# The driver.


def nvml(status: int = 0) -> SimpleNamespace:
    """A fake of NVIDIA's management library."""

    def driver_version(text: Any, length: ctypes.c_uint) -> int:
        assert length.value == len(text)
        text.value = b"580.65.06"
        return 0

    def cuda_version(version: Any) -> int:
        version._obj.value = 12040
        return 0

    def count_devices(count: Any) -> int:
        count._obj.value = 2
        return 0

    return SimpleNamespace(
        nvmlInit_v2=lambda: status,
        nvmlErrorString=lambda code: f"error {code}".encode(),
        nvmlSystemGetDriverVersion=driver_version,
        nvmlSystemGetCudaDriverVersion_v2=cuda_version,
        nvmlDeviceGetCount_v2=count_devices,
        nvmlShutdown=lambda: 0,
    )


def library(monkeypatch: pytest.MonkeyPatch, found: object) -> None:
    """Make every shared library load as `found`, or fail to load if None."""

    def load(name: str) -> object:
        if found is None:
            raise OSError(f"{name}: cannot open shared object file")
        return found

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_probe_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_nvidia_displays", lambda: 2)
    library(monkeypatch, nvml())
    expected = {"pci": 2, "library": True, "version": "580.65.06", "cuda": [12, 4], "gpus": 2}
    assert device.probe_driver() == expected
    library(monkeypatch, nvml(status=18))
    assert device.probe_driver() == {"pci": 2, "library": True, "broken": "error 18"}
    library(monkeypatch, None)
    assert device.probe_driver() == {"pci": 2, "library": False}


def test_nvidia_displays_counts_display_controllers(tmp_path: Path) -> None:
    assert device._nvidia_displays(tmp_path) == 0
    for address, vendor, kind in (("a", "0x10de", "0x0302"), ("b", "0x10de", "0x0403"), ("c", "0x8086", "0x0300")):
        folder = tmp_path / "sys/bus/pci/devices" / address
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{kind}00\n")
    (tmp_path / "sys/bus/pci/devices/gone").mkdir()
    assert device._nvidia_displays(tmp_path) == 1


# GPUs.


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch report two GPUs; the test fakes CUDA's library."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    properties = [SimpleNamespace(name="A100", major=8, minor=0), SimpleNamespace(name="T4", major=7, minor=5)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 + index, 20))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)


@pytest.mark.usefixtures("two_gpus")
def test_probe_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def device_of(handle: Any, index: int) -> int:
        handle._obj.value = index + 100
        return 0

    def attribute(value: Any, which: int, handle: ctypes.c_int) -> int:
        assert which == 95  # CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH of cuda.h
        value._obj.value = int(handle.value == 100)
        return 0

    library(monkeypatch, SimpleNamespace(cuDeviceGet=device_of, cuDeviceGetAttribute=attribute))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    found = device.probe_gpus()
    assert found["visible"] == "0,1"
    assert found["gpus"] == [
        {"name": "A100", "capability": [8, 0], "free": 10, "total": 20, "cooperative": True},
        {"name": "T4", "capability": [7, 5], "free": 11, "total": 20, "cooperative": False},
    ]


def test_probe_gpus_reports_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        warnings.warn("CUDA initialization: the driver is too old\nmore", UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    expected = {"visible": None, "reason": "CUDA initialization: the driver is too old", "gpus": []}
    assert device.probe_gpus() == expected


def nvjpeg(created: int, engines: int = 0, asked: int = 0) -> SimpleNamespace:
    def create(backend: int, _device: object, _pinned: object, flags: int, handle: Any) -> int:
        assert (backend, flags) == (3, 0)  # NVJPEG_BACKEND_HARDWARE of nvjpeg.h
        handle._obj.value = 1234
        return created

    def info(handle: ctypes.c_void_p, count: Any, cores: Any) -> int:
        assert handle.value == 1234
        count._obj.value, cores._obj.value = engines, 1
        return asked

    return SimpleNamespace(nvjpegCreateEx=create, nvjpegGetHardwareDecoderInfo=info, nvjpegDestroy=lambda _: 0)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (nvjpeg(0, engines=7), {"engines": 7, "cores": 1}),
        (nvjpeg(0, engines=0), {"engines": 0, "cores": 1}),
        (nvjpeg(7), {"engines": 0, "cores": 0}),  # NVJPEG_STATUS_ARCH_MISMATCH
        (nvjpeg(6), {"unknown": "nvJPEG answers with status 6"}),
        (nvjpeg(0, asked=1), {"unknown": "nvJPEG status 1"}),
        (None, {"unknown": "nvJPEG is not installed"}),
    ],
)
def test_probe_jpeg_engines(monkeypatch: pytest.MonkeyPatch, answer: object, found: dict[str, Any]) -> None:
    library(monkeypatch, answer)
    assert images.probe_jpeg_engines() == [found, found]


def test_nvjpeg_of_dali_has_the_functions() -> None:
    pytest.importorskip("nvidia.dali", reason="nvJPEG comes with DALI")
    found = images._nvjpeg()
    assert all((found.nvjpegCreateEx, found.nvjpegGetHardwareDecoderInfo, found.nvjpegDestroy))


# Kernels and decoders.


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the CPU paths")
def test_probe_kernels_compares_with_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNST_KERNELS", "auto")
    found = device.probe_kernels()
    assert found["settings"]["FASTNST_KERNELS"] == "auto"
    assert found["gpus"] == 0
    assert 0 <= found["error"] < 1e-5
    for fault in (lambda y: y * 1.1, lambda y: y * float("nan")):
        with monkeypatch.context() as patch:
            gram = fastnst_kernels.gram_matrix
            patch.setattr(fastnst_kernels, "gram_matrix", lambda x, gram=gram, fault=fault: fault(gram(x)))
            assert row_of("kernels", kernels=device.probe_kernels()).status == "FAIL"
    monkeypatch.setenv("FASTNST_KERNELS", "fast")
    with pytest.raises(ValueError, match="FASTNST_KERNELS='fast' is unknown"):
        device.probe_kernels()


def test_probe_dali_compares_with_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(images, "_cuda_devices", lambda: 0)
    found = images.probe_dali()
    assert found["gpu"] is None
    assert found["cpu"] < 2
    monkeypatch.setattr(images, "_decoded", lambda *_: np.zeros((64, 64, 3)))
    assert row_of("DALI", dali=images.probe_dali()).status == "FAIL"


def test_probe_dali_that_fails_on_the_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali")
    decoded = images._decoded

    def broken_on_the_gpu(encoded: Any, place: str) -> Any:
        if place != "cpu":
            raise RuntimeError("CUDA driver version is insufficient")
        return decoded(encoded, place)

    monkeypatch.setattr(images, "_cuda_devices", lambda: 1)
    monkeypatch.setattr(images, "_decoded", broken_on_the_gpu)
    found = images.probe_dali()
    assert found["gpu"] is None
    assert found["gpu_broken"] == "RuntimeError: CUDA driver version is insufficient"


def test_probe_pillow_without_webp(monkeypatch: pytest.MonkeyPatch) -> None:
    supported = [name for name in features.get_supported() if name != "webp"]
    monkeypatch.setattr(features, "get_supported", lambda: supported)
    found = images.probe_pillow()
    assert found["lacks"] == ["webp"]
