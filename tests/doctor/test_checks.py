"""Checks of `fastnst doctor`, for given results of the probes."""

from typing import Any

import pytest

from helpers.doctor.machines import ABSENT, DAMAGED, GIB, H200, NO_DRIVER, NO_GPU, SHA, assert_row, row_of, with_package

REFERENCE = {"implementation": "reference"}
FORCED_REFERENCE = REFERENCE | {"settings": {"FASTNST_KERNELS": "reference"}}
INTERPRETED = {"interpreted": True, "settings": {"TRITON_INTERPRET": "1"}}
OLD = {"version": "1.20", "fits": False}
OLD_TRITON = with_package("triton", fits=False)["packages"] | {"triton": "3.1.0", "triton_pin": None}
NO_DALI = {"dali__": {"broken": "no module"}}
BROKEN_DRIVER = {"pci": 0, "library": True, "broken": "version mismatch"}
CONTAINER = {"limit": 8 * GIB, "available": 2 * GIB}
NO_WEIGHTS = {"weights": {"files": [ABSENT]}}
UNREADABLE = DAMAGED | {"unreadable": "Permission denied", "sha256": None}
TWO_FILES = [DAMAGED, DAMAGED | {"path": "/var/torch/vgg19.pth", "sha256": SHA}]
NO_HOME = {"folders": {"cache": None}}
NO_LOCKS = ["locks: No locks available"]
REMOVE = "rm /var/cache/fastnst/weights/vgg19.pth"

# Check, status, parts of what is found and of the fix, and how the machine differs from a healthy one.
CASES: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("Python", "FAIL", "3.9.2 … >=3.11", ">=3.11", {"packages": {"python": "3.9.2", "python_fits": False}}),
    ("platform", "WARN", "aarch64 … DALI", "--loader pillow", {"packages": {"machine": "aarch64"}}),
    ("packages", "WARN", "source", "pip install --editable .", {"packages": {"fastnst": None, "packages": {}}}),
    ("packages", "FAIL", "numpy 1.20 (needs >=1.26)", "pip install 'numpy>=1.26'", with_package("numpy", **OLD)),
    ("packages", "FAIL", "numpy is missing", "'numpy>=1.26'", with_package("numpy", version=None, fits=False)),
    ("torch", "FAIL", "No module named", "'torch>=2.11'", {"torch__": {"broken": "No module named 'torch'"}}),
    ("torch", "FAIL", "2.5.0", "'torch>=2.11'", with_package("torch", fits=False) | {"torch": {"version": "2.5.0"}}),
    ("torch", "WARN", "CPU build … 1 NVIDIA GPU", "pip uninstall", {"torch": {"cuda": None}}),
    ("torch", "PASS", "CPU build", "", {"torch": {"cuda": None}, "driver__": NO_DRIVER}),
    ("Triton", "WARN", "not installed", "pip install triton==3.7.1", {"packages": {"triton": None}}),
    ("Triton", "WARN", "cannot be imported", "triton==3.7.1", {"triton": {"broken": "ImportError: no"}}),
    ("Triton", "WARN", "3.6.0", "triton==3.7.1", {"packages": {"triton": "3.6.0", "triton_pairs": False}}),
    ("Triton", "FAIL", "3.1.0", "pip install 'triton>=3.6'", {"packages": OLD_TRITON}),
    ("Triton", "PASS", "CPU build asks for none", "", {"packages": {"triton_pin": None}}),
    ("TensorBoard", "FAIL", "no module", "'tensorboard>=2.17'", {"tensorboard__": {"broken": "no module"}}),
    ("TensorBoard", "FAIL", "needs >=2.17", "'tensorboard>=2.17'", with_package("tensorboard", fits=False)),
    ("TensorBoard", "WARN", "(gone)", "tensorboard-data-server", {"tensorboard": {"server": None, "why": "gone"}}),
    ("Pillow", "FAIL", "no _imaging", "'pillow>=11.3'", {"pillow__": {"broken": "no _imaging"}}),
    ("Pillow", "FAIL", "needs >=11.3", "'pillow>=11.3'", with_package("pillow", fits=False)),
    ("Pillow", "FAIL", "JPEG and PNG", "--force-reinstall", {"pillow": {"lacks": ["jpg", "zlib"]}}),
    ("Pillow", "FAIL", "without colour profiles", "--force-reinstall", {"pillow": {"lacks": ["littlecms2", "avif"]}}),
    ("Pillow", "WARN", "without AVIF (such images are rejected)", "--force-reinstall", {"pillow": {"lacks": ["avif"]}}),
    ("Pillow", "WARN", "without libjpeg-turbo", "--force-reinstall", {"pillow": {"turbo": None}}),
    ("Pillow", "WARN", "without WebP", "--force-reinstall", {"pillow": {"lacks": ["webp"]}}),
    ("DALI", "FAIL", "no module", "--loader pillow", NO_DALI),
    ("DALI", "WARN", "no module", "--loader pillow", with_package("nvidia-dali-cuda130", needed=False) | NO_DALI),
    ("DALI", "FAIL", "wrongly on the CPU", "--loader pillow", {"dali": {"cpu": 80.0}}),
    ("DALI", "FAIL", "wrongly on the GPU", "--loader pillow", {"dali": {"gpu": float("nan")}}),
    ("DALI", "FAIL", "not on the GPU", "nvidia-dali-cuda120", {"dali": {"gpu": None, "gpu_broken": "CUDA"}}),
    ("DALI", "PASS", "on the CPU", "", {"dali": {"gpu": None}}),
    ("NVIDIA driver", "PASS", "none", "", {"driver__": NO_DRIVER}),
    ("NVIDIA driver", "WARN", "2 NVIDIA GPUs", "--gpus all", {"driver__": {"pci": 2, "library": False}}),
    ("NVIDIA driver", "WARN", "1 NVIDIA GPU on the bus", "install NVIDIA", {"driver__": BROKEN_DRIVER | {"pci": 1}}),
    ("NVIDIA driver", "FAIL", "mismatch", "restart", {"driver__": BROKEN_DRIVER}),
    ("NVIDIA driver", "FAIL", "CUDA up to 12.4", "for CUDA 13.0", {"driver": {"cuda": [12, 4]}, "gpus__": NO_GPU}),
    ("NVIDIA driver", "PASS", "12.4", "", {"driver": {"cuda": [12, 4]}}),
    ("GPU", "WARN", "none … CPU", "8.0 or newer", {"gpus__": NO_GPU, "driver__": NO_DRIVER}),
    ("GPU", "WARN", "torch's CPU build", "see torch", {"gpus__": NO_GPU, "torch": {"cuda": None}}),
    ("GPU", "WARN", "CUDA_VISIBLE_DEVICES=", "unset CUDA", {"gpus__": NO_GPU | {"visible": ""}}),
    ("GPU", "FAIL", "too old", "see NVIDIA driver", {"gpus__": NO_GPU | {"reason": "too old"}}),
    ("GPU", "WARN", "7.5 … no bf16", "fp16", {"gpus": {"gpus": [H200 | {"capability": [7, 5]}]}}),
    ("GPU", "WARN", "1.0 GiB of 140.0 GiB", "nvidia-smi", {"gpus": {"gpus": [H200 | {"free": GIB}]}}),
    ("GPU", "WARN", "cooperative", "FASTNST_COOPERATIVE=0", {"gpus": {"gpus": [H200 | {"cooperative": False}]}}),
    ("GPU 1", "WARN", "0.0 GiB", "nvidia-smi", {"gpus": {"gpus": [H200, H200 | {"free": 0}]}}),
    ("GPU 0", "PASS", "H200", "", {"gpus": {"gpus": [H200, H200 | {"free": 0}]}}),
    ("kernels", "FAIL", "wrong results … 5.0e-01", "FASTNST_KERNELS=reference", {"kernels": {"error": 0.5}}),
    ("kernels", "FAIL", "wrong results", "FASTNST_KERNELS=reference", {"kernels": {"error": float("nan")}}),
    ("kernels", "WARN", "PyTorch paths", "unset FASTNST_KERNELS", {"kernels": FORCED_REFERENCE}),
    ("kernels", "WARN", "PyTorch paths", "see Triton", {"kernels": REFERENCE}),
    ("kernels", "WARN", "TRITON_INTERPRET=1", "unset TRITON", {"kernels": INTERPRETED}),
    ("kernels", "FAIL", "C compiler", "apt install gcc", {"kernels": "RuntimeError: no C compiler"}),
    ("kernels", "FAIL", "'fast' is unknown", "unset", {"kernels": "ValueError: FASTNST_KERNELS='fast' is unknown"}),
    ("kernels", "FAIL", "no answer", "FASTNST_KERNELS=reference", {"kernels": "no answer within 120 s"}),
    ("kernels", "PASS", "paths run on the CPU", "", {"kernels": REFERENCE | {"gpus": 0}, "gpus__": NO_GPU}),
    ("JPEG decoder", "PASS", "decoded on the CPU", "", {"jpeg_engines": []}),
    ("JPEG decoder", "PASS", "none in this GPU", "", {"jpeg_engines": [{"engines": 0, "cores": 0}]}),
    ("JPEG decoder", "WARN", "unknown: status 6", "nvjpeg", {"jpeg_engines": [{"unknown": "status 6"}]}),
    ("memory", "WARN", "3.0 GiB of 128.0 GiB", "train.batch_size", {"host": {"available": 3 * GIB}}),
    ("memory", "FAIL", "0.5 GiB", "end other programs", {"host": {"available": GIB // 2}}),
    ("memory", "WARN", "2.0 GiB of 8.0 GiB … limit, of 128.0 GiB", "give the container more", {"host": CONTAINER}),
    ("CPU", "WARN", "4 of 16 cores … 8 threads", "export OMP_NUM_THREADS=4", {"host": {"usable": 4}}),
    ("CPU", "WARN", "grants 1.5", "export OMP_NUM_THREADS=1", {"host": {"quota": 1.5}}),
    ("CPU", "PASS", "(OMP_NUM_THREADS=8)", "", {"host": {"omp": "8"}}),
    ("CPU", "PASS", "16 of 16 cores", "", {"torch__": {"broken": "gone"}}),
    ("/dev/shm", "FAIL", "OSError: no", "mount -t tmpfs", {"shared_memory": {"broken": "OSError: no"}}),
    ("open files", "WARN", "256 per process", "ulimit -n 4096", {"host": {"files": 256}}),
    ("open files", "WARN", "64 per process", "data.workers", {"host": {"files": 64, "files_hard": 64}}),
    ("open files", "PASS", "any number", "", {"host": {"files": None}}),
    ("disk", "WARN", "1.0 GiB", "--out", {"folders": {"here_free": GIB}}),
    ("disk", "FAIL", "0.0 GiB", "--out", {"folders": {"here_free": 0}}),
    ("disk", "WARN", "not writable", "--out", {"folders": {"here_writable": False}}),
    ("disk", "WARN", "without locks: No locks available", "--out", {"folders": {"here_lacks": NO_LOCKS}}),
    ("cache", "WARN", "without locks: No locks available", "FASTNST_CACHE", {"folders": {"cache_lacks": NO_LOCKS}}),
    ("cache", "FAIL", "Read-only", "export FASTNST_CACHE=", {"folders": {"cache_refused": "Read-only"}}),
    ("cache", "WARN", "0.0 GiB", "export FASTNST_CACHE=", {"folders": {"cache_free": 0}}),
    ("cache", "PASS", "at first use", "", {"folders": {"cache_exists": False}}),
    ("cache", "WARN", "none: there is no home folder", "export FASTNST_CACHE=", NO_HOME),
    ("VGG19 weights", "WARN", "no folder to keep", "--vgg FILE, or", NO_WEIGHTS | NO_HOME),
    ("VGG19 weights", "WARN", "not here", "curl … https://example.org/vgg19.pth", NO_WEIGHTS),
    ("VGG19 weights", "WARN", "2 MB of them came", "curl", {"weights": {"files": [ABSENT], "part": 2000000.0}}),
    ("VGG19 weights", "FAIL", "only 0.0 GiB", "export FASTNST_CACHE=", NO_WEIGHTS | {"folders": {"cache_free": 100}}),
    ("VGG19 weights", "WARN", "", '"$MIRROR"', {"weights": {"files": [ABSENT], "url": "$MIRROR"}}),
    ("VGG19 weights", "FAIL", "SHA-256 0b0b0b0b…, must be dcdcdcdc…", REMOVE, {"weights": {"files": [DAMAGED]}}),
    ("VGG19 weights", "FAIL", "12 bytes, must be 5740", "rm", {"weights": {"files": [DAMAGED | {"size": 12}]}}),
    ("VGG19 weights", "FAIL", "cannot be read: Permission denied", REMOVE, {"weights": {"files": [UNREADABLE]}}),
    (
        "VGG19 weights",
        "WARN",
        "/var/torch/vgg19.pth, SHA-256 right; but /var",
        REMOVE,
        {"weights": {"files": TWO_FILES}},
    ),
]


@pytest.mark.parametrize(("name", "status", "found", "fix", "changes"), CASES)
def test_check(name: str, status: str, found: str, fix: str, changes: dict[str, Any]) -> None:
    assert_row(row_of(name, **changes), status, found, fix)
