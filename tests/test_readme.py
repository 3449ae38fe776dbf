"""The README's promises that can be checked without carrying them out: its commands parse, its links lead somewhere."""

import json
import re
import shlex
from pathlib import Path

import click
import pytest

from fastnst.cli.main import cli
from fastnst.config import preset_names

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


# What `fastnst` is told, also by way of torchrun.
OURS = [command for command in COMMANDS if command.startswith(("fastnst ", "torchrun "))]


@pytest.mark.parametrize("command", OURS)
def test_command_parses(command: str) -> None:
    words = shlex.split(command)
    words = words[words.index("fastnst") + 1 :]
    parser: click.Command = cli
    while isinstance(parser, click.Group):
        name, *words = words
        assert name in parser.commands, f"{command!r}: there is no command {name!r}"
        parser = parser.commands[name]
    parser.make_context(command, words).close()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in OURS])
def test_script_is_there(command: str) -> None:
    words = [word for word in shlex.split(command) if "=" not in word]
    script = next(word for word in words if word not in ("python", "bash", "pytest"))
    assert (ROOT / script).is_file(), command


def test_there_are_commands_of_both_kinds() -> None:
    assert len([command for command in COMMANDS if command.startswith("fastnst ")]) >= 6
    assert "./scripts/demo.sh" in COMMANDS
    assert "./scripts/test.sh" in COMMANDS


def test_links_and_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    named = re.findall(r"`((?:tests|benchmarks|kernels|scripts)/[^`*… ]+)`", README)
    assert links
    assert named
    missing = [name for name in links + named if not (ROOT / name).exists()]
    assert not missing


def test_every_preset_is_described() -> None:
    described = re.findall(r"^\| `([a-z][a-z0-9-]+)`", README, flags=re.MULTILINE)
    assert sorted(described) == sorted(preset_names())


def test_the_measured_claim_is_in_the_results() -> None:
    claim = re.search(r"delivers ([\d.]+) times as many.*?`(benchmarks/results/[^`]+)`", README, flags=re.DOTALL)
    assert claim is not None
    rows = json.loads((ROOT / claim[2]).read_text("utf-8"))["rows"]
    speed = {row["name"]: row["pictures_per_second"] for row in rows}
    ratio = speed["DALI loader, 2 threads, cpu"] / speed["Pillow, one process, no loader"]
    assert float(claim[1]) == pytest.approx(ratio, abs=0.05)


def test_the_claim_about_projections_is_in_the_results() -> None:
    pattern = r"projected in less than a (\w+) of the time.*?`(benchmarks/results/[^`]+)`"
    claim = re.search(pattern, README, flags=re.DOTALL)
    assert claim is not None
    seconds = {row["name"]: row["seconds"] for row in json.loads((ROOT / claim[2]).read_text("utf-8"))["rows"]}
    ratio = seconds["projections of the strongest activation"] / seconds["input gradients, 16 to a batch"]
    assert claim[1] == "tenth"
    assert ratio < 1 / 10


@pytest.mark.parametrize(
    "pattern",
    [
        r"makes ([\d.]+) times as many images.*?with ([\d.]+) times its memory.*?`(benchmarks/results/[^`]+)`",
        r"for the default preset it is ([\d.]+) times with ([\d.]+) times\s+\(`(benchmarks/results/[^`]+)`",
    ],
)
def test_the_claims_about_training_steps_are_in_the_results(pattern: str) -> None:
    claim = re.search(pattern, README, flags=re.DOTALL)
    assert claim is not None
    rows = {row["provider"]: row for row in json.loads((ROOT / claim[3]).read_text("utf-8"))}
    ours = rows.pop("fastnst")
    best = max(
        (row for name, row in rows.items() if name.startswith("eager")), key=lambda row: row["images_per_second"]
    )
    assert float(claim[1]) == pytest.approx(ours["images_per_second"] / best["images_per_second"], abs=0.006)
    assert float(claim[2]) == pytest.approx(ours["peak_memory_bytes"] / best["peak_memory_bytes"], abs=0.006)


def test_the_claim_about_styles_is_in_the_results() -> None:
    claim = re.search(
        r"take ([\d.]+) times as long as one after.*?`(benchmarks/results/[^`]+)`", README, flags=re.DOTALL
    )
    assert claim is not None
    result = json.loads((ROOT / claim[2]).read_text("utf-8"))
    assert float(claim[1]) == pytest.approx(result["together_over_alone"], abs=0.006)
    assert (result["styles"], result["image_size"], result["batch_size"]) == (3, 128, 4)
    assert result["weights_relative_distance"] == 0


def test_the_claim_about_the_cache_is_in_the_results() -> None:
    pattern = r"deliver (\d+) times as many images per second.*?`(benchmarks/results/[^`]+)`"
    claim = re.search(pattern, README, flags=re.DOTALL)
    assert claim is not None
    speed = {
        row["name"]: row["pictures_per_second"] for row in json.loads((ROOT / claim[2]).read_text("utf-8"))["rows"]
    }
    (cache,) = (value for name, value in speed.items() if name.startswith("Cache"))
    (dali,) = (value for name, value in speed.items() if name.startswith("DALI"))
    assert int(claim[1]) == round(cache / dali)
