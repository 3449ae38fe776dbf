"""Checks of `fastnst doctor` on Python, packages and decoders, for given results."""

from typing import Any

import pytest

from helpers.doctor_machines import NO_DRIVER, assert_row, row_of, with_package


@pytest.mark.parametrize(
    ("name", "status", "found", "fix", "changes"),
    [
        ("Python", "FAIL", "3.9.2 … >=3.11", ">=3.11", {"packages": {"python": "3.9.2", "python_fits": False}}),
        ("platform", "WARN", "aarch64 … DALI", "--loader pillow", {"packages": {"machine": "aarch64"}}),
        ("packages", "WARN", "source", "pip install --editable .", {"packages": {"fastnst": None, "packages": {}}}),
        (
            "packages",
            "FAIL",
            "numpy 1.20 (needs >=1.26)",
            "pip install 'numpy>=1.26'",
            {"packages": with_package("numpy", version="1.20", fits=False)},
        ),
        (
            "packages",
            "FAIL",
            "numpy is missing",
            "pip install 'numpy>=1.26'",
            {"packages": with_package("numpy", version=None, fits=False)},
        ),
        (
            "torch",
            "FAIL",
            "No module named 'torch'",
            "pip install 'torch>=2.11'",
            {"torch__": {"broken": "ModuleNotFoundError: No module named 'torch'"}},
        ),
        (
            "torch",
            "FAIL",
            "2.5.0 … >=2.11",
            "pip install 'torch>=2.11'",
            {"packages": with_package("torch", version="2.5.0", fits=False), "torch": {"version": "2.5.0"}},
        ),
        ("torch", "WARN", "CPU build … 1 NVIDIA GPU", "pip uninstall", {"torch": {"cuda": None}}),
        ("torch", "PASS", "CPU build", "", {"torch": {"cuda": None}, "driver__": NO_DRIVER}),
        ("Triton", "WARN", "not installed", "pip install triton==3.7.1", {"packages": {"triton": None}}),
        ("Triton", "WARN", "cannot be imported", "triton==3.7.1", {"triton": {"broken": "ImportError: no"}}),
        (
            "Triton",
            "WARN",
            "3.6.0 … ==3.7.1",
            "pip install triton==3.7.1",
            {"packages": {"triton": "3.6.0", "triton_pairs": False}},
        ),
        (
            "Triton",
            "FAIL",
            "3.1.0 … >=3.6",
            "pip install 'triton>=3.6'",
            {"packages": with_package("triton", fits=False) | {"triton": "3.1.0", "triton_pin": None}},
        ),
        ("Triton", "PASS", "CPU build asks for none", "", {"packages": {"triton_pin": None}}),
        ("TensorBoard", "FAIL", "no module", "'tensorboard>=2.17'", {"tensorboard__": {"broken": "no module"}}),
        (
            "TensorBoard",
            "FAIL",
            "2.21.0; fastnst needs >=2.17",
            "'tensorboard>=2.17'",
            {"packages": with_package("tensorboard", fits=False)},
        ),
        (
            "TensorBoard",
            "WARN",
            "data server (no module)",
            "pip install tensorboard-data-server",
            {"tensorboard": {"server": None, "why": "no module"}},
        ),
        ("Pillow", "FAIL", "no _imaging", "'pillow>=11'", {"pillow__": {"broken": "no _imaging"}}),
        ("Pillow", "FAIL", "needs >=11", "'pillow>=11'", {"packages": with_package("pillow", fits=False)}),
        ("Pillow", "FAIL", "JPEG and PNG", "--force-reinstall", {"pillow": {"jpeg": False, "png": False}}),
        ("Pillow", "WARN", "without libjpeg-turbo", "--force-reinstall", {"pillow": {"turbo": None}}),
        ("Pillow", "WARN", "without WebP", "--force-reinstall", {"pillow": {"webp": False}}),
        (
            "DALI",
            "FAIL",
            "no module",
            "--loader pillow … 'nvidia-dali-cuda130>=2.0'",
            {"dali__": {"broken": "no module"}},
        ),
        (
            "DALI",
            "WARN",
            "no module",
            "--loader pillow",
            {"dali__": {"broken": "no module"}, "packages": with_package("nvidia-dali-cuda130", needed=False)},
        ),
        ("DALI", "FAIL", "wrongly on the CPU", "--loader pillow", {"dali": {"cpu": 80.0}}),
        ("DALI", "FAIL", "wrongly on the GPU", "--loader pillow", {"dali": {"gpu": float("nan")}}),
        (
            "DALI",
            "FAIL",
            "not on the GPU … CUDA",
            "nvidia-dali-cuda120",
            {"dali": {"gpu": None, "gpu_broken": "RuntimeError: CUDA"}},
        ),
        ("DALI", "PASS", "on the CPU", "", {"dali": {"gpu": None}}),
    ],
)
def test_check_installation(name: str, status: str, found: str, fix: str, changes: dict[str, Any]) -> None:
    assert_row(row_of(name, **changes), status, found, fix)
