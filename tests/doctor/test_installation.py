"""What `fastnst doctor` says of good and bad installations: Python, packages, decoders."""

from typing import Any

import pytest

from helpers.doctor_machines import NO_DRIVER, check_row, row_of, with_package


@pytest.mark.parametrize(
    ("name", "changes", "status", "found", "fix"),
    [
        ("Python", {"packages": {"python": "3.9.2", "python_fits": False}}, "FAIL", ["3.9.2", ">=3.11"], [">=3.11"]),
        ("platform", {"packages": {"machine": "aarch64"}}, "WARN", ["aarch64", "DALI"], ["--loader pillow"]),
        ("packages", {"packages": {"fastnst": None, "packages": {}}}, "WARN", ["source"], ["pip install --editable ."]),
        (
            "packages",
            {"packages": with_package("numpy", version="1.20", fits=False)},
            "FAIL",
            ["numpy 1.20 (needs >=1.26)"],
            ["pip install 'numpy>=1.26'"],
        ),
        (
            "packages",
            {"packages": with_package("numpy", version=None, fits=False)},
            "FAIL",
            ["numpy is missing"],
            ["pip install 'numpy>=1.26'"],
        ),
        (
            "torch",
            {"torch__": {"broken": "ModuleNotFoundError: No module named 'torch'"}},
            "FAIL",
            ["No module named 'torch'"],
            ["pip install 'torch>=2.11'"],
        ),
        (
            "torch",
            {"packages": with_package("torch", version="2.5.0", fits=False), "torch": {"version": "2.5.0"}},
            "FAIL",
            ["2.5.0", ">=2.11"],
            ["pip install 'torch>=2.11'"],
        ),
        ("torch", {"torch": {"cuda": None}}, "WARN", ["CPU build", "1 NVIDIA GPU"], ["pip uninstall"]),
        ("torch", {"torch": {"cuda": None}, "driver__": NO_DRIVER}, "PASS", ["CPU build"], []),
        ("Triton", {"packages": {"triton": None}}, "WARN", ["not installed"], ["pip install triton==3.7.1"]),
        ("Triton", {"triton": {"broken": "ImportError: no"}}, "WARN", ["cannot be imported"], ["triton==3.7.1"]),
        (
            "Triton",
            {"packages": {"triton": "3.6.0", "triton_pairs": False}},
            "WARN",
            ["3.6.0", "==3.7.1"],
            ["pip install triton==3.7.1"],
        ),
        (
            "Triton",
            {"packages": with_package("triton", fits=False) | {"triton": "3.1.0", "triton_pin": None}},
            "FAIL",
            ["3.1.0", ">=3.6"],
            ["pip install 'triton>=3.6'"],
        ),
        ("Triton", {"packages": {"triton_pin": None}}, "PASS", ["CPU build asks for none"], []),
        ("TensorBoard", {"tensorboard__": {"broken": "no module"}}, "FAIL", ["no module"], ["'tensorboard>=2.17'"]),
        (
            "TensorBoard",
            {"packages": with_package("tensorboard", fits=False)},
            "FAIL",
            ["2.21.0; fastnst needs >=2.17"],
            ["'tensorboard>=2.17'"],
        ),
        (
            "TensorBoard",
            {"tensorboard": {"server": None, "why": "no module"}},
            "WARN",
            ["data server (no module)"],
            ["pip install tensorboard-data-server"],
        ),
        ("Pillow", {"pillow__": {"broken": "no _imaging"}}, "FAIL", ["no _imaging"], ["'pillow>=11'"]),
        ("Pillow", {"packages": with_package("pillow", fits=False)}, "FAIL", ["needs >=11"], ["'pillow>=11'"]),
        ("Pillow", {"pillow": {"jpeg": False, "png": False}}, "FAIL", ["JPEG and PNG"], ["--force-reinstall"]),
        ("Pillow", {"pillow": {"turbo": None}}, "WARN", ["without libjpeg-turbo"], ["--force-reinstall"]),
        ("Pillow", {"pillow": {"webp": False}}, "WARN", ["without WebP"], ["--force-reinstall"]),
        (
            "DALI",
            {"dali__": {"broken": "no module"}},
            "FAIL",
            ["no module"],
            ["--loader pillow", "'nvidia-dali-cuda130>=2.0'"],
        ),
        (
            "DALI",
            {"dali__": {"broken": "no module"}, "packages": with_package("nvidia-dali-cuda130", needed=False)},
            "WARN",
            ["no module"],
            ["--loader pillow"],
        ),
        ("DALI", {"dali": {"cpu": 80.0}}, "FAIL", ["wrongly on the CPU"], ["--loader pillow"]),
        ("DALI", {"dali": {"gpu": float("nan")}}, "FAIL", ["wrongly on the GPU"], ["--loader pillow"]),
        (
            "DALI",
            {"dali": {"gpu": None, "gpu_broken": "RuntimeError: CUDA"}},
            "FAIL",
            ["not on the GPU", "CUDA"],
            ["nvidia-dali-cuda120"],
        ),
        ("DALI", {"dali": {"gpu": None}}, "PASS", ["on the CPU"], []),
    ],
)
def test_verdict(name: str, changes: dict[str, Any], status: str, found: list[str], fix: list[str]) -> None:
    check_row(row_of(name, **changes), status, found, fix)
