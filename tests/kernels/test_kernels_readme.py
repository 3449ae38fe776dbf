"""The commands, files and tables of the kernels' README exist and are up to date."""

import re
import shlex
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

import kernel_calls  # noqa: E402
import kernel_report  # noqa: E402

import fastnst_kernels  # noqa: E402

README = (ROOT / "kernels" / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def rewritten() -> str:
    # Not within a test, where each allocation is filled with NaN: at these sizes that takes long.
    return kernel_report.with_bytes_section(README)


def test_readme_tables_of_bytes_are_of_these_kernels(rewritten: str) -> None:
    command = "python scripts/kernel_report.py --bytes kernels/README.md"
    assert rewritten == README, f"kernels have changed; write them anew: {command}"
    assert README.count("| `instance_norm") >= 6


def test_with_bytes_section_refuses_other_files() -> None:
    with pytest.raises(ValueError, match="there is no <!-- written by"):
        kernel_report.with_bytes_section("# Kernels\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_exists(command: str) -> None:
    words = [word for word in shlex.split(command) if word not in ("python", "-m", "pytest")]
    assert (ROOT / words[0]).exists(), command
    if words[0] == "scripts/kernel_report.py":
        kernel_report.main.make_context(words[0], words[1:]).close()


def test_readme_has_commands_for_tests_report_and_time() -> None:
    for start in ("python -m pytest tests/kernels", "python scripts/kernel_report.py", "python -m pytest benchmarks/"):
        assert [command for command in COMMANDS if command.startswith(start)], start


def test_readme_files_exist() -> None:
    files = re.findall(r"`((?:tests|benchmarks|scripts)/[^`*… ]+)`", README)
    modules = re.findall(r"`(?:fastnst_kernels/)?((?!tests/|scripts/|benchmarks/)[\w/]+\.py)`", README)
    assert files
    assert modules
    missing = [file for file in files if not (ROOT / file).exists()]
    missing += [file for file in modules if not (ROOT / "kernels" / "fastnst_kernels" / file).exists()]
    assert missing == []


def test_readme_describes_every_public_op() -> None:
    described = set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE))
    helpers = {"StyleMatrix", "style_loss_and_matrix"}
    public = {name for name in fastnst_kernels.__all__ if not name.endswith("_reference")} - helpers
    assert public <= described
    assert public == set(kernel_calls.OPS), "each public op has cases in the report"
