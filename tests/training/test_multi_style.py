"""Several styles in one process: each as if it had been trained alone, whatever happens to one of them."""

import json
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastnst.config import Config
from fastnst.data.loaders import open_loader
from fastnst.data.replacements import REJECTED_NAME, read_failures
from fastnst.errors import DataError, DivergedError, StoppedBySignal, UserError
from fastnst.losses.fused import FusedPerceptualLoss
from fastnst.storage import StorageError, lock_run
from fastnst.training import trainer
from fastnst.training.memory.estimate import estimate
from fastnst.training.run_dir.checkpoint import checkpoint_steps
from fastnst.training.run_dir.layout import CONFIG_NAME
from fastnst.training.run_dir.style_folder import STYLES_NAME, style_names
from fastnst.training.signals import StopRequest
from fastnst.training.step.train_step import NetTrainer
from fastnst.training.style_run import StyleRun
from helpers.run_comparison import assert_same_outcome, assert_same_weights
from helpers.tiny_runs import (
    ASSIGNMENTS,
    Killed,
    before_each_step,
    leave_out_graph,
    logged,
    make_small,
    newest,
    real_config,
    small_config,
    train_killed_at,
    train_small,
)

NAMES = ("image_00", "image_01", "image_02")


@pytest.fixture
def styles(generated_photos: Path) -> dict[str, Path]:
    """A JPEG, a PNG and a WebP."""
    return style_names([next(generated_photos.glob(f"{name}.*")) for name in NAMES])


@pytest.fixture
def config(generated_photos: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Of small runs."""
    make_small(monkeypatch)
    return small_config(generated_photos)


def train_each(config: Config, styles: dict[str, Path], out: Path) -> None:
    for name, image in styles.items():
        train_small(changed(config, "style", image=image), out / name)


def changed(config: Config, section: str, **values: object) -> Config:
    """The same configuration with other values in one section."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def assert_same_outcomes(runs: Path, references: Path, names: Iterable[str] = NAMES) -> None:
    for name in names:
        assert_same_outcome(runs / name, references / name)


# What each has of it.


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_train_styles_gives_each_what_it_has_alone(
    config: Config, styles: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    config = changed(config, "train", precision=precision, samples=1)
    train_each(config, styles, tmp_path / "alone")
    messages = train_small(config, tmp_path / "together", styles=styles)
    assert_same_outcomes(tmp_path / "together", tmp_path / "alone")
    assert len({logged(tmp_path / "together" / name)[-1]["loss/style"] for name in styles}) == len(styles)
    assert any(message.startswith("training: 3 styles, 5 steps of 2 images") for message in messages)
    if precision == "fp16":
        assert [m.partition(":")[0] for m in messages if "fp16: 0 of 5 steps skipped" in m] == list(NAMES)


@pytest.mark.parametrize(
    ("preset", "more"),
    [
        ("vgg-conv3", ("model.norm=batch",)),
        # A CPU without instructions for bf16 takes a minute for it.
        pytest.param("hwalsuklee", ("train.precision=bf16",), marks=pytest.mark.campaign),
        pytest.param("johnson", (), marks=pytest.mark.campaign),
        pytest.param("johnson", ("train.engine=autograd",), marks=pytest.mark.campaign),
    ],
)
def test_train_styles_with_real_networks_gives_each_what_it_has_alone(
    generated_photos: Path,
    styles: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    more: tuple[str, ...],
) -> None:
    leave_out_graph(monkeypatch)
    sizes = ("data.image_size=32", "train.batch_size=2", "train.steps=2")
    config = real_config(generated_photos, *sizes, *more, preset=preset)
    two = {name: styles[name] for name in NAMES[:2]}
    train_each(config, two, tmp_path / "alone")
    train_small(config, tmp_path / "together", styles=two)
    assert_same_outcomes(tmp_path / "together", tmp_path / "alone", two)


def test_train_styles_computes_content_features_once(
    config: Config, styles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    original = FusedPerceptualLoss.content_targets

    def counted(self: FusedPerceptualLoss, content: torch.Tensor) -> dict[str, torch.Tensor]:
        passes.append(len(content))
        return original(self, content)

    monkeypatch.setattr(FusedPerceptualLoss, "content_targets", counted)
    stages: set[int] = set()
    before_each_step(monkeypatch, lambda net_trainer, _: stages.add(id(net_trainer._engine._stages)))
    train_small(config, tmp_path, styles=styles)
    assert passes == [2] * 5
    assert len(stages) == 1


# Interrupted runs.


@pytest.mark.parametrize(("style", "step"), [(NAMES[0], 2), (NAMES[1], 4), (NAMES[2], 5)])
def test_train_styles_resumes_after_a_kill_between_two_saves(
    config: Config, styles: dict[str, Path], tmp_path: Path, style: str, step: int
) -> None:
    """Also where only one checkpoint is kept, so that the styles have none in common."""
    config = changed(config, "train", keep_checkpoints=1)
    train_small(config, tmp_path / "whole", styles=styles)
    train_killed_at(step, config, tmp_path / "parts", style=style, styles=styles)
    before = {2: 0, 4: 2, 5: 4}[step]
    saved = [max(checkpoint_steps(tmp_path / "parts" / name), default=0) for name in styles]
    assert saved == [step if NAMES.index(name) < NAMES.index(style) else before for name in NAMES]
    messages = train_small(config, tmp_path / "parts", resume=True, styles=styles)
    assert any(m.startswith(f"resuming at step {before}" if before else "training: 3 styles") for m in messages)
    assert_same_outcomes(tmp_path / "parts", tmp_path / "whole")


def test_train_styles_resume_leaves_a_finished_style_as_it_is(
    config: Config, styles: dict[str, Path], tmp_path: Path
) -> None:
    train_killed_at(5, config, tmp_path, style=NAMES[1], styles=styles)
    first = tmp_path / NAMES[0]
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    train_small(config, tmp_path, resume=True, styles=styles)
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert [logged(tmp_path / name)[-1]["step"] for name in styles] == [5, 5, 5]
    messages = train_small(config, tmp_path, resume=True, styles=styles)
    assert messages[-1].startswith("nothing to do: 5 of 5 steps are done")


def test_train_styles_saves_all_at_the_same_step_on_a_signal(
    config: Config, styles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    with monkeypatch.context() as patches:
        before_each_step(patches, lambda _, step: setattr(stop, "signum", signal.SIGTERM if step == 3 else None))
        with pytest.raises(StoppedBySignal, match=r"stopped at step 3 of 5.*fastnst train --resume --out \S+parts$"):
            train_small(config, tmp_path / "parts", stop=stop, styles=styles)
    assert [max(checkpoint_steps(tmp_path / "parts" / name)) for name in styles] == [3, 3, 3]
    train_small(config, tmp_path / "parts", resume=True, styles=styles)
    train_small(config, tmp_path / "whole", styles=styles)
    for name in styles:
        assert_same_weights(tmp_path / "parts" / name, tmp_path / "whole" / name)


def test_train_styles_resumes_a_style_that_went_on_alone(
    config: Config, styles: dict[str, Path], tmp_path: Path
) -> None:
    train_killed_at(4, config, tmp_path, style=NAMES[0], styles=styles)
    train_small(changed(config, "style", image=styles[NAMES[1]]), tmp_path / NAMES[1], resume=True)
    assert checkpoint_steps(tmp_path / NAMES[1])[-1] == 5
    messages = train_small(config, tmp_path, resume=True, styles=styles)
    assert any(message.startswith("resuming at step 2") for message in messages)
    train_small(config, tmp_path / "whole", styles=styles)
    assert_same_outcomes(tmp_path, tmp_path / "whole")


def test_train_styles_resumes_after_a_kill_before_all_have_begun(
    config: Config, styles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = StyleRun.prepare
    parts = tmp_path / "parts"

    def die(run: StyleRun, *arguments: Any, **options: Any) -> Any:
        if run.out.name == dying:
            raise Killed
        return prepare(run, *arguments, **options)

    monkeypatch.setattr(StyleRun, "prepare", die)
    # While none has begun there is no run, and nothing is lost by beginning anew.
    for begun in (0, 1):
        dying = NAMES[begun]
        with pytest.raises(Killed):
            train_small(config, parts, styles=styles)
        assert len(list(parts.rglob(CONFIG_NAME))) == begun
    with pytest.raises(UserError, match=r"holds runs of the styles image_00, image_01, image_02; go on with"):
        train_small(config, parts, styles=styles)
    dying = ""
    train_small(config, parts, resume=True, styles=styles)
    train_small(config, tmp_path / "whole", styles=styles)
    assert_same_outcomes(parts, tmp_path / "whole")


def test_train_styles_lists_a_failed_image_for_each_style(
    config: Config, photo_folder: Path, styles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And taken from any of the lists when the run goes on: the process may have been killed between two of them."""

    def opening(*arguments: Any, **options: Any) -> Any:
        (photo_folder / "image_07.png").unlink(missing_ok=True)
        return open_loader(*arguments, **options)

    config = changed(changed(config, "train", steps=12), "data", folder=photo_folder)
    monkeypatch.setattr(trainer, "open_loader", opening)
    messages = train_small(config, tmp_path / "runs", styles=styles)
    failed = [read_failures(tmp_path / "runs" / name / REJECTED_NAME) for name in styles]
    assert [failure.entry.path for failure in failed[0]] == ["image_07.png"]
    assert failed[0] == failed[1] == failed[2]
    assert sum("image_07.png failed in step" in message for message in messages) == 1
    (tmp_path / "runs" / NAMES[0] / REJECTED_NAME).write_text("")
    train_small(config, tmp_path / "runs", resume=True, styles=styles)
    assert read_failures(tmp_path / "runs" / NAMES[0] / REJECTED_NAME) == failed[0]


def test_train_styles_stops_all_if_one_diverges(
    config: Config, styles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[NetTrainer] = []

    def poison(net_trainer: NetTrainer, step: int) -> None:
        made.append(net_trainer)
        if step == 4 and net_trainer is made[1]:
            net_trainer.net.conv1.weight.data[0, 0, 0, 0] = float("nan")

    before_each_step(monkeypatch, poison)
    with pytest.raises(DivergedError, match=r"training diverged: .*image_01/checkpoints/step_00000002.*NAME"):
        train_small(config, tmp_path, styles=styles)
    for name in styles:
        assert newest(tmp_path / name).step == 2
        assert all(torch.isfinite(tensor).all() for tensor in newest(tmp_path / name).tensors.values())


def test_train_styles_says_what_is_saved_if_the_storage_refuses(
    config: Config, styles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StyleRun._save_checkpoint

    def refuse(run: StyleRun, step: int) -> None:
        if run.out.name == NAMES[2] and step == 4:
            raise StorageError("cannot write it: No space left on device")
        original(run, step)

    monkeypatch.setattr(StyleRun, "_save_checkpoint", refuse)
    with pytest.raises(StorageError, match=r"step 2 is the last that is saved of all styles; go on with fastnst train"):
        train_small(config, tmp_path, styles=styles)


def test_train_styles_locks_each_run_directory(config: Config, styles: dict[str, Path], tmp_path: Path) -> None:
    train_small(config, tmp_path, styles=styles)
    for owned in (tmp_path, tmp_path / NAMES[2]):
        with lock_run(owned), pytest.raises(UserError, match=f"{owned} is in use by another fastnst process"):
            train_small(config, tmp_path, resume=True, styles=styles)
    train_small(config, tmp_path, resume=True, styles=styles)


# What is refused.


def test_train_styles_refuses_folders_that_hold_something_else(
    config: Config, styles: dict[str, Path], tmp_path: Path
) -> None:
    def refuses(name: str, message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            train_small(options.pop("config", config), tmp_path / name, **{"styles": styles, **options})

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    train_small(config, tmp_path / "one")
    train_small(config, tmp_path / "three", styles=styles)
    refuses("mine", r"mine is not empty \(it holds 'notes.txt'\)")
    for resume in (False, True):
        refuses("one", "one holds the run of one style, and 3 are given; choose another --out", resume=resume)
    refuses("nothing", r"nothing holds no styles to resume \(styles.json is missing\)", resume=True)
    refuses("three", "three is not empty", styles=None)
    two = {name: styles[name] for name in NAMES[:2]}
    message = "begun with the styles image_00, image_01, image_02, and image_00,"
    refuses("three", message, styles=two, resume=True)
    faster = changed(config, "train", learning_rate=0.5)
    refuses("three", r"train\.learning_rate was", config=faster, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "one", "three"]


def test_train_styles_refuses_a_broken_style_image(config: Config, styles: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        train_small(config, tmp_path / "out", styles=styles | {"broken": tmp_path / "broken.jpg"})
    assert not (tmp_path / "out").exists()


# The command line.

Fastnst = Callable[..., tuple[int, str, str]]


def arguments_for(styles: dict[str, Path], photos: Path, *more: object) -> list[object]:
    sets = [word for assignment in ASSIGNMENTS for word in ("--set", assignment)]
    given = [word for image in styles.values() for word in ("--style", image)]
    return ["train", *given, "--data", photos, "--preset", "vgg-conv3", "--vgg", "random", *sets, *more]


@pytest.mark.usefixtures("config")
def test_train_command_trains_and_resumes_several_styles(
    photo_folder: Path, tmp_path: Path, fastnst: Fastnst, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    styles = {name: Path(shutil.copy(next(photo_folder.glob(f"{name}.*")), images)) for name in NAMES[:2]}
    code, out, err = fastnst(*arguments_for(styles, photo_folder))
    assert code == 0, err
    folder = Path("runs/image_00+image_01")
    assert out.splitlines() == [
        *(f"style model      {folder / name / 'model.safetensors'}" for name in styles),
        f"TensorBoard log  {folder}",
    ]
    assert f"fastnst tensorboard {folder}; use it: fastnst stylize {folder / 'image_00'} IMAGE" in err
    assert json.loads((folder / STYLES_NAME).read_text()) == {name: str(path) for name, path in styles.items()}
    code, out, err = fastnst("stylize", folder, styles[NAMES[0]], "--out", tmp_path / "stylized.png")
    assert code == 3
    assert f"{folder} holds 2 style models, each in a folder; give one, such as {folder / 'image_00'}" in err
    code, out, err = fastnst("train", "--resume", "--out", folder)
    assert (code, "nothing to do: 5 of 5 steps are done" in err) == (0, True)
    code, out, err = fastnst("train", "--resume", "--out", folder, "--steps", 6)
    assert (code, "resuming at step 5: 2 styles" in err) == (0, True), err
    assert [logged(folder / name)[-1]["step"] for name in styles] == [6, 6]
    code, out, err = fastnst("train", "--resume", "--out", folder, "--style", styles[NAMES[0]])
    assert code == 2
    assert "was begun with the styles image_00, image_01, and image_00 are given" in err
    code, out, err = fastnst(*arguments_for(styles, photo_folder))
    assert code == 2
    assert "holds runs of the styles image_00, image_01; go on with them by --resume" in err
    styles[NAMES[1]].write_bytes(styles[NAMES[0]].read_bytes())
    code, out, err = fastnst("train", "--resume", "--out", folder, "--steps", 7)
    assert code == 3
    assert "image_01/checkpoints/step_00000006 was trained otherwise: the style image changed" in err
    assert [logged(folder / name)[-1]["step"] for name in styles] == [6, 6]
    code, out, err = fastnst("train", "--resume", "--out", folder, "--steps", 7, "--allow-changes")
    assert code == 0, err
    assert "image_01: goes on, though the style image changed" in err


@pytest.mark.usefixtures("config")
def test_train_dry_run_plans_several_styles(
    photo_folder: Path, styles: dict[str, Path], tmp_path: Path, fastnst: Fastnst
) -> None:
    code, out, err = fastnst(*arguments_for(styles, photo_folder, "--out", tmp_path / "out", "--dry-run"))
    assert code == 0, err
    assert [line.split(",")[0] for line in out.splitlines() if line.startswith("# style ")] == [
        f"# style      {image}" for image in styles.values()
    ]
    assert "# styles     3, trained together" in out
    assert not (tmp_path / "out").exists()
    code, _, err = fastnst(*arguments_for({}, photo_folder, "--style", "a.jpg", "--style", "b/a.png", "--dry-run"))
    assert code == 2
    assert "would have the same run directory as" in err
    names = [tmp_path / f"{'x' * 90}{index}.jpg" for index in range(3)]
    code, _, err = fastnst(*arguments_for({path.stem: path for path in names}, photo_folder, "--dry-run"))
    assert code == 2
    assert "3 styles want a folder for their runs; give one with --out" in err


def test_estimate_counts_every_network(config: Config) -> None:
    config = changed(config, "train", precision="fp32")
    one, three = (estimate(config, device_type="cpu", styles=count) for count in (1, 3))
    # Weights, gradients and two moments of each further net, and three of these in each checkpoint.
    net = one.disk // (3 * (config.train.keep_checkpoints + 1) + 1)
    assert three.weights - one.weights == 2 * 4 * net
    assert three.disk == 3 * one.disk
    assert three.activations == one.activations
