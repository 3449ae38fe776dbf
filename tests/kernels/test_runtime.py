"""Which implementation runs, and in which memory format."""

import subprocess
import sys

import pytest
import torch

import fastnst_kernels
from fastnst_kernels import runtime
from helpers.kernels.kernel_cases import LAYOUTS


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = str(next(iter(fastnst_kernels.__path__)) + "/..")
    prelude = f"import sys; sys.path.insert(0, {path!r})\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_implementation_reads_the_environment_at_every_call(monkeypatch):
    assert runtime.implementation(torch.zeros(1)) == "reference"
    monkeypatch.setattr(runtime, "INTERPRETING", True)
    assert runtime.implementation(torch.zeros(1)) == "triton"
    assert runtime.implementation(torch.zeros(1, dtype=torch.float64)) == "reference"
    monkeypatch.setenv("FASTNST_KERNELS", "reference")
    assert runtime.implementation(torch.zeros(1)) == "reference"
    monkeypatch.setenv("FASTNST_KERNELS", "triton")
    assert runtime.implementation(torch.zeros(1)) == "triton"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fast", r"FASTNST_KERNELS='fast' is unknown: use 'auto', 'triton' or 'reference'"),
        ("triton", r"FASTNST_KERNELS=triton, but the tensor is on the CPU .*: use FASTNST_KERNELS=auto"),
    ],
)
def test_implementation_refuses_an_impossible_choice(monkeypatch, value, message):
    monkeypatch.setenv("FASTNST_KERNELS", value)
    with pytest.raises(ValueError, match=message):
        fastnst_kernels.gram_matrix(torch.zeros(1, 2, 3, 4))


def test_implementation_without_triton_is_the_reference():
    code = """
sys.modules["triton"] = None
import torch, fastnst_kernels as k
x = torch.arange(16.0).view(1, 1, 4, 4)
y, switches = k.max_pool2d_switches(x)
print(k.runtime.triton, y.flatten().tolist(), switches.flatten().tolist())
"""
    assert run_python(code).stdout.strip() == "None [5.0, 7.0, 13.0, 15.0] [3, 3, 3, 3]"


def test_package_keeps_former_names():
    k = fastnst_kernels
    assert (k.picture_input, k.tap_backward) == (k.uint8_to_input, k.loss_relu_backward)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 3, 4, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_prq_of_any_layout(shape, layout):
    """Read as [P, R, Q], a dense tensor's memory holds plane n·C + c at p·Q + q for every r."""
    n, c = shape[:2]
    plane = torch.arange(n * c, dtype=torch.float32).view(n, c, 1, 1).expand(shape).contiguous()
    x = runtime.dense(LAYOUTS[layout](plane))
    p, r, q = runtime.as_prq(x)
    memory = torch.as_strided(x, (x.numel(),), (1,), x.storage_offset()).view(p, r, q)
    assert torch.equal(memory.long(), torch.arange(p * q).view(p, 1, q).expand(p, r, q))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_allocate_like_follows_the_format(layout):
    x = LAYOUTS[layout](torch.zeros(2, 3, 4, 5))
    y = runtime.allocate_like(x, (2, 3, 2, 1), torch.uint8)
    assert y.dtype == torch.uint8
    assert y.shape == (2, 3, 2, 1)
    assert runtime.memory_format_of(y) == runtime.memory_format_of(x)
    assert runtime.memory_format_of(x) == (torch.channels_last if "last" in layout else torch.contiguous_format)


def test_ceil_div_and_power_of_two():
    assert [runtime.ceil_div(n, 4) for n in (1, 4, 5)] == [1, 1, 2]
    assert [runtime.power_of_two(n) for n in (1, 2, 3, 5, 64, 65)] == [1, 2, 4, 8, 64, 128]
