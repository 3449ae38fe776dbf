"""Random command lines: a documented exit code, no traceback, nothing written elsewhere."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastnst.cli import main as cli
from fastnst.models.style_model import save_style_model
from fastnst.models.transform_net import TransformNet
from fastnst.run_log.writer import RunLog

EXIT_CODES = {0, 2, 3, 4, 5}
PATHS = [
    "photo.png",
    "photos",
    "model.safetensors",
    "run",
    "text.txt",
    "absent",
    "out",
    "out/new",
    "",
    ".",
    "é\udcff.png",
]


def _commands(group: click.Group, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    found: dict[tuple[str, ...], click.Command] = {}
    for name, command in group.commands.items():
        deeper = isinstance(command, click.Group)
        found |= _commands(command, (*path, name)) if deeper else {(*path, name): command}
    return found


# These two train, or start one process after another, however odd the rest of the line is.
COMMANDS = {path: command for path, command in _commands(cli.cli).items() if path not in (("demo",), ("doctor",))}

paths = st.sampled_from(PATHS)
# What a system can hand over: bytes that are not UTF-8 arrive as some surrogates, and no others arrive.
words = st.text(st.characters(exclude_characters="\0/", codec="utf-8"), max_size=8) | st.binary(max_size=8).map(
    os.fsdecode
)
words = words.filter(lambda word: word not in ("..", "demo") and not {"\0", "/"} & {*word})
numbers = st.sampled_from(["0", "1", "16", "-1", "1.5", "1e9", "9" * 30, "9" * 5000, "nan", "٣", ""])
maps = ["relu1_1", "conv1_2", "relu1_1:3", "relu1_1:99", "conv9_9", "class:3", "class:cat", "top:2", "all", "conv1"]
choices = ["cpu", "cuda", "fp32", "random", "auto", "pillow", "dali", "vgg-conv3", "grey", "out"]
assignments = ["train.steps=1", "train.steps=" + "9" * 5000, "style.image='\\u0000'", "data.workers=1"]
names = st.sampled_from(maps) | st.sampled_from(choices) | st.sampled_from(assignments)
values = st.one_of(paths, words, numbers, names)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with options of its own, and some that are not, in any order."""
    path = draw(st.sampled_from([*COMMANDS]))
    parameters = COMMANDS[path].params
    arguments: list[str] = []
    for parameter in parameters:
        if isinstance(parameter, click.Argument):
            arguments += draw(st.lists(paths | words, min_size=1, max_size=2 if parameter.nargs == -1 else 1))
    options = [parameter for parameter in parameters if isinstance(parameter, click.Option)]
    required = [option for option in options if option.required and draw(st.integers(0, 9))]
    for option in [*required, *draw(st.lists(st.sampled_from(options), max_size=5))] if options else []:
        arguments.append(option.opts[0])
        if not option.is_flag:
            is_path = isinstance(option.type, click.Path)
            arguments.append(draw(paths if is_path else values))
    if draw(st.booleans()):
        arguments.insert(draw(st.integers(0, len(arguments))), draw(words))
    # Nothing is fetched, and what could train for long only says what it would do.
    if path == ("train",):
        arguments.append("--dry-run")
    if path[0] == "visualize" and path != ("visualize", "transform"):
        arguments += ["--vgg", draw(st.sampled_from(["random", "text.txt", "absent"]))]
    return [*path, *arguments]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with something of each kind in it; beside it an empty home."""
    above = tmp_path_factory.mktemp("fuzz")
    folder = above / "work"
    (folder / "photos").mkdir(parents=True)
    (folder / "run").mkdir()
    (above / "home").mkdir()
    image = Image.new("RGB", (24, 20), "teal")
    image.save(folder / "photo.png")
    image.save(folder / "photos" / "one.jpg")
    (folder / "text.txt").write_text("text")
    save_style_model(folder / "model.safetensors", TransformNet("johnson"), metadata={})
    with RunLog(folder / "run") as log:
        log.metrics(0, {"loss/total": 1.0})
    (folder / "run" / "config.toml").write_text('preset = "vgg-conv3"\n')
    before, environment = Path.cwd(), dict(os.environ)
    os.chdir(folder)
    # No address at all: asked to download, it says so at once.
    os.environ |= {"HOME": str(above / "home"), "FASTNST_VGG19_URL": "none", "FASTNST_CACHE": str(folder / "cache")}
    yield folder
    os.chdir(before)
    os.environ.clear()
    os.environ.update(environment)


def check(folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: started.append(command))
    monkeypatch.setattr(sys, "argv", ["fastnst", *arguments])
    # Some results are bytes, for names that are not UTF-8.
    out, printed = io.TextIOWrapper(io.BytesIO(), errors="surrogateescape"), io.StringIO()
    torch.manual_seed(0)
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(printed):
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
    assert code in EXIT_CODES, printed.getvalue()
    assert "Traceback" not in printed.getvalue()
    assert len(printed.getvalue()) < 20_000
    if code:
        assert printed.getvalue().strip(), "refused without a word"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["home", "work"]
    assert list((folder.parent / "home").iterdir()) == []
    assert (folder / "text.txt").read_text() == "text"
    if started:
        assert "localhost" in started[0] or "--host" in arguments


several = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@given(command_lines())
@several
@example(["train", "--set", "train.steps=" + "9" * 5000, "--dry-run"])
@example(["train", "--set", "style.image='\\u0000'", "--data", "photos", "--dry-run"])
@example(["train", "--steps", "9" * 5000, "--dry-run"])
@example(["stylize", "model.safetensors", "photo.png", "--out", ""])
@example(["visualize", "transform", "run", "photo.png", "--out", "out", "--checkpoint", "9" * 30])
def test_main_with_random_options(folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    check(folder, arguments, monkeypatch)


@given(
    st.lists(words | st.sampled_from(["-h", "--help", "--version", "train", "--", "-", "--set", "data"]), max_size=4)
)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_main_with_random_words(folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    check(folder, arguments, monkeypatch)


@pytest.mark.campaign
@given(command_lines())
@settings(several, max_examples=5000)
def test_main_with_many_random_options(folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """A quarter of an hour: `pytest -m campaign tests/cli/test_fuzz_command_line.py`."""
    check(folder, arguments, monkeypatch)
