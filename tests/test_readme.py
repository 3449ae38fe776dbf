"""README.md and CONTRIBUTING.md: commands run, links lead somewhere, snippets run, figures are in the results."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from PIL import Image

from fastnst.cli.main import cli
from fastnst.config import preset_names
from fastnst.models.vgg19 import VGG19

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README + CONTRIBUTING, flags=re.DOTALL)
COMMANDS = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
FASTNST = [command for command in COMMANDS if re.match(r"(\.venv/bin/)?fastnst |torchrun ", command)]
OTHERS = [command for command in COMMANDS if command not in FASTNST and not command.startswith(("git ", "pip "))]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("command", FASTNST)
def test_command_parses(command: str) -> None:
    words = shlex.split(command.replace(".venv/bin/", ""))
    words = words[words.index("fastnst") + 1 :]
    parser: click.Command = cli
    while isinstance(parser, click.Group):
        name, *words = words
        assert name in parser.commands, f"{command!r}: there is no command {name!r}"
        parser = parser.commands[name]
    parser.make_context(command, words).close()


TINY = {
    **{"DATA__IMAGE_SIZE": "32", "DATA__LOADER": "pillow", "DATA__WORKERS": "1", "STYLE__SIZE": "32"},
    **{"TRAIN__STEPS": "2", "TRAIN__BATCH_SIZE": "2", "TRAIN__DEVICE": "cpu", "TRAIN__SAMPLES": "1"},
    **{"TRAIN__CHECKPOINT_EVERY": "1", "VISUALIZE__EVERY": "0", "LOSS__VGG": "random"},
}
"""Environment in which README's commands take seconds."""


@pytest.mark.slow
def test_commands_run_in_their_order(
    few_photos: Path, tmp_path: Path, fastnst: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What README's reader types, from the demo to the sheets, on small images and with untrained weights."""
    pytest.importorskip("skimage", reason="the demo's photos ship with scikit-image")
    monkeypatch.chdir(tmp_path)
    for key, value in TINY.items():
        monkeypatch.setenv(f"FASTNST_{key}", value)
    for folder in ("train2017", "photos"):
        shutil.copytree(few_photos, folder)
    for name in ("wave.jpg", "scream.jpg", "udnie.jpg", "photo.jpg", "cat.jpg"):
        Image.open(few_photos / "image_00.jpg").resize((80, 72)).save(name)
    served: list[str] = []
    monkeypatch.setattr(os, "execv", lambda _, words: served.extend(words))
    # Only `train` takes its weights from the environment.
    monkeypatch.setattr("fastnst.models.weights.load_vgg19", untrained_vgg19)
    ran = []
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            match words:
                case ["./scripts/demo.sh"]:
                    words = ["fastnst", "demo", "--vgg", "random", "--steps", "1"]
                case ["torchrun", *_]:
                    run_torchrun(words)
                case ["git" | "pip" | "pytest" | "python", *_] | [*_, "scripts/gpu_report.sh"]:
                    continue  # other tests run benchmarks, and no test clones
            if Path(words[0]).name == "fastnst":
                words += ["--size", "64"] if words[1] == "visualize" else []
                # The checkpoint of a tiny run.
                code, _, err = fastnst(*("2" if word == "1000" else word for word in words[1:]))
                assert code == 0, f"{line}\n{err}"
            ran.append(words)
    assert len(ran) >= 15
    assert served[served.index("--logdir") + 1] == "runs/wave"
    assert Path("stylized.png").is_file()
    assert {path.name for path in Path("seen").glob("index.html")} == {"index.html"}


def untrained_vgg19(_spec: str, *, last_layer: str, **_options: object) -> VGG19:
    return VGG19(last_layer, generator=torch.Generator().manual_seed(0))


def run_torchrun(words: list[str]) -> None:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", OTHERS)
def test_script_exists(command: str) -> None:
    words = [word for word in shlex.split(command) if "=" not in word]
    script = next(word for word in words if word not in ("python", "bash", "pytest", "source"))
    assert (ROOT / script).is_file() or script.startswith(".venv/"), command


def test_commands_cover_the_first_steps() -> None:
    assert len(FASTNST) >= 6
    assert "./scripts/demo.sh" in COMMANDS
    assert "./scripts/test.sh --quick" in COMMANDS


def test_readme_is_short_and_names_the_papers() -> None:
    assert len(README.splitlines()) <= 180
    assert [paper for paper in ("1603.08155", "1311.2901", "1607.08022", "1508.06576") if paper not in README] == []
    assert "not measured on a gpu yet" in "\n".join(README.splitlines()[:20]).lower()


@pytest.mark.parametrize("page", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_links_and_files_exist(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page) if not link.startswith("http")]
    named = re.findall(r"`((?:tests|benchmarks|kernels|scripts|fastnst)/[^`*…<> ]+)`", page)
    assert links + named
    assert [name for name in links + named if not (ROOT / name.partition("#")[0]).exists()] == []
    headings = re.findall(r"^#+ (.*)$", README + "\n" + CONTRIBUTING, flags=re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    assert {link.partition("#")[2] for link in links if "#" in link} <= anchors


def test_snippets_are_short() -> None:
    assert len(SNIPPETS) == 3
    assert max(len(snippet.splitlines()) for snippet in SNIPPETS) <= 20


@pytest.mark.parametrize("index", range(3), ids=["train", "deconvnet", "kernels"])
def test_snippet_runs(index: int, few_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(few_photos, "train2017")
    for name in ("wave.jpg", "photo.jpg"):
        shutil.copy(few_photos / "image_00.jpg", name)
    tiny = {"DATA__IMAGE_SIZE": 32, "DATA__LOADER": "pillow", "DATA__WORKERS": 1, "STYLE__SIZE": 32}
    tiny |= {
        "TRAIN__STEPS": 1,
        "TRAIN__BATCH_SIZE": 1,
        "TRAIN__DEVICE": "cpu",
        "TRAIN__SAMPLES": 1,
        "VISUALIZE__EVERY": 0,
    }
    for key, value in (tiny | {"LOSS__VGG": "random"}).items():
        monkeypatch.setenv(f"FASTNST_{key}", str(value))
    names: dict[str, Any] = {}
    exec(SNIPPETS[index].replace('load_vgg19("auto"', 'load_vgg19("random"'), names)
    if index == 0:
        assert Path("stylized.png").is_file()
    elif index == 1:
        assert names["projections"].shape == (1, 2, 3, *names["photo"].shape[2:])
        assert bool(names["projections"].abs().amax() > 0)
    else:
        assert bool(names["x"].grad.abs().amax() > 0)


def test_every_preset_is_described() -> None:
    described = re.findall(r"^\| `([a-z][a-z0-9-]+)`", README, flags=re.MULTILINE)
    assert sorted(described) == sorted(preset_names())


def results(file: str) -> Any:
    return json.loads((ROOT / file).read_text("utf-8"))


def claim(pattern: str) -> re.Match[str]:
    found = re.search(pattern + r".*?`(benchmarks/results/[^`]+)`", README, flags=re.DOTALL)
    assert found is not None
    return found


def test_figure_of_the_loaders_is_in_the_results() -> None:
    found = claim(r"delivers ([\d.]+) times as many images per second as the Pillow loader")
    speed = {row["name"]: row["pictures_per_second"] for row in results(found[2])["rows"]}
    ratio = speed["DALI loader, 2 threads, cpu"] / speed["Pillow loader, 2 processes"]
    assert float(found[1]) == pytest.approx(ratio, abs=0.006)


def test_figure_of_projections_is_in_the_results() -> None:
    found = claim(r"in less than a (\w+) of the time")
    seconds = {row["name"]: row["seconds"] for row in results(found[2])["rows"]}
    ratio = seconds["projections of the strongest activation"] / seconds["input gradients, 16 to a batch"]
    assert found[1] == "tenth"
    assert ratio < 1 / 10


@pytest.mark.parametrize(
    "pattern",
    [
        r"processes ([\d.]+) times as many images.*?with ([\d.]+) times its memory",
        r"with the default preset it is ([\d.]+) times with ([\d.]+) times",
        r"use AVX-512, ([\d.]+) times with ([\d.]+) times",
    ],
)
def test_figures_of_training_steps_are_in_the_results(pattern: str) -> None:
    found = claim(pattern)
    rows = {row["provider"]: row for row in results(found[3])}
    ours = rows.pop("fastnst")
    best = max(
        (row for name, row in rows.items() if name.startswith("eager")), key=lambda row: row["images_per_second"]
    )
    assert float(found[1]) == pytest.approx(ours["images_per_second"] / best["images_per_second"], abs=0.006)
    assert float(found[2]) == pytest.approx(ours["peak_memory_bytes"] / best["peak_memory_bytes"], abs=0.006)


def test_figure_of_several_styles_is_in_the_results() -> None:
    found = claim(r"take ([\d.]+) times as\s+long as one after")
    result = results(found[2])
    assert float(found[1]) == pytest.approx(result["together_over_alone"], abs=0.006)
    assert (result["styles"], result["image_size"], result["batch_size"]) == (3, 128, 4)
    assert result["weights_relative_distance"] == 0


def test_figure_of_two_trainings_is_in_the_results() -> None:
    found = claim(r"make ([\d.]+) times the images per second of one\s+alone")
    result = results(found[2])
    assert float(found[1]) == pytest.approx(result["together_over_alone"], abs=0.006)
    assert result["trainings"] == 2


def test_figure_of_large_images_is_in_the_results() -> None:
    found = claim(r"6000 × 4000 px take ([\d.]+) times the memory")
    (row,) = [row for row in results(found[2])["rows"] if (row["width"], row["height"]) == (6000, 4000)]
    assert float(found[1]) == pytest.approx(row["ratios"]["peak_bytes"], abs=0.006)
    assert row["difference"] <= 1
