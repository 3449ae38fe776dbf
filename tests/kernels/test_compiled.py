"""Every kernel compiles, without a GPU, into machine code that keeps the rules of `kernels/README.md`.

The public ops run on CPU tensors with recorders in place of their kernels, and each launch is compiled for each
architecture as Triton's launcher would. `scripts/kernel_report.py` shows the figures behind these tests.
"""

import os
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import kernel_calls
import kernel_report

from fastnst_kernels.inspection import ARCHITECTURES
from fastnst_kernels.inspection.recording import kernels_of

KERNELS = sorted({name for module in kernel_calls.package_modules() for name in kernels_of(module)})


@pytest.fixture(scope="module")
def report() -> kernel_report.Report:
    return kernel_report.make_report(jobs=os.cpu_count() or 1)


@pytest.fixture(scope="module")
def unread() -> list[str]:
    # Not within a test, where each allocation is filled with NaN: at these sizes that takes half a minute.
    with kernel_calls.watched_tables() as entries:
        for architecture in ARCHITECTURES:
            kernel_calls.record_calls(architecture)
    return entries


def test_package_modules_have_kernels() -> None:
    assert len(KERNELS) >= 10


# The norms' backward that holds its gradient in registers would spill there; another kernel is launched.
NOT_LAUNCHED = [("one_pass_backward_kernel", "sm_100")]


@pytest.mark.parametrize(
    ("kernel", "architecture"), [pair for pair in product(KERNELS, ARCHITECTURES) if pair not in NOT_LAUNCHED]
)
def test_kernel_keeps_the_rules(kernel: str, architecture: str, report: kernel_report.Report) -> None:
    compiled = [one for one in report.kernels if (one.kernel, one.architecture.name) == (kernel, architecture)]
    assert compiled, "no public op launches it at any of the recorded shapes"
    assert [line for line in report.broken if line.startswith(f"{architecture} {kernel} ")] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_multiply_16_bits_on_tensor_cores(architecture: str, report: kernel_report.Report) -> None:
    ours = [call for call in report.calls if call.architecture == architecture]
    assert set(kernel_calls.PRODUCTS) <= {call.case.name for call in ours if call.case.hot}
    assert kernel_calls.slow_products(report.kernels, ours) == []


def test_kernel_calls_read_every_table_entry(unread: list[str]) -> None:
    assert unread == []


def test_one_pass_kernels_move_little_more_than_the_minimum(report: kernel_report.Report) -> None:
    """The operands of the launches, each counted once; partial results, statistics and counters included."""
    seen = set()
    for call in report.calls:
        one_pass = any("one_pass" in launch.kernel for launch in call.launches)
        others = call.case.op.endswith("switches") or call.case.op in kernel_calls.IMAGE_OPTIONS
        if call.case.hot and (one_pass or others):
            seen.add(call.case.op)
            assert call.bytes <= 1.05 * call.minimum_bytes, call
    ops = {"instance_norm", "batch_norm", "max_pool2d_switches", "max_unpool2d_switches"}
    assert ops | kernel_calls.IMAGE_OPTIONS.keys() <= seen


def test_image_kernels_move_rows_in_16_bytes(report: kernel_report.Report) -> None:
    """Except uint8, read in vectors as long as the result's, or as a padding of 4 pixels allows."""
    hot = {launch.identity for call in report.calls if call.case.hot for launch in call.launches}
    seen = []
    for kernel in report.kernels:
        if kernel.module.endswith("image.kernels") and kernel.launches[0].identity in hot:
            seen.append(kernel.kernel)
            assert kernel.widest_store == 128, kernel
            loads = 128
            if kernel.kernel == "_uint8_to_input_kernel":
                loads = 32 if kernel.configuration["PADDING"] == 4 else 64
            assert kernel.widest_load == loads, kernel
    assert len(seen) == len(ARCHITECTURES) * len(kernel_calls.DTYPES) * (3 + 1 + 1)
