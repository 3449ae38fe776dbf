"""Several styles in one process: each as if it had been trained alone, whatever happens to one of them."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.compat.proto.graph_pb2 import GraphDef

from fastnst.config import Config, load_config
from fastnst.data.loaders import open_loader
from fastnst.data.replacements import REJECTED_NAME, read_failures
from fastnst.errors import DataError, DivergedError, StoppedBySignal, UserError
from fastnst.losses.fused import FusedPerceptualLoss
from fastnst.storage import StorageError, lock_run
from fastnst.training import trainer
from fastnst.training.memory.estimate import estimate
from fastnst.training.monitoring import snapshots
from fastnst.training.run_dir.checkpoint import checkpoint_steps, latest_checkpoint
from fastnst.training.run_dir.layout import CONFIG_NAME
from fastnst.training.run_dir.style_folder import STYLES_NAME, saved_styles, style_names
from fastnst.training.signals import StopRequest
from fastnst.training.step.train_step import NetTrainer
from fastnst.training.style_run import StyleRun
from helpers.run_comparison import assert_same_outcome
from helpers.tiny_runs import ASSIGNMENTS, logged, make_small, small_config, train_small

NAMES = ("image_00", "image_01", "image_02")


class Killed(Exception):
    """Ends a run as SIGKILL would: nothing is saved on the way out."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture
def styles(generated_photos: Path) -> dict[str, Path]:
    """A JPEG, a PNG and a WebP."""
    return style_names([next(generated_photos.glob(f"{name}.*")) for name in NAMES])


def train_together(config: Config, styles: dict[str, Path], out: Path, **options: Any) -> list[str]:
    """Train; return what was logged."""
    return train_small(config, out, styles=styles, **options)


def train_each(config: Config, styles: dict[str, Path], out: Path) -> None:
    for name, image in styles.items():
        style = config.style.model_copy(update={"image": image})
        train_small(config.model_copy(update={"style": style}), out / name)


def kill_at(monkeypatch: pytest.MonkeyPatch, style: str, step: int, name: str = "_save_checkpoint") -> None:
    """The next run dies just before it does `name` of a style for `step`."""
    original = getattr(StyleRun, name)

    def die(run: StyleRun, *arguments: Any) -> None:
        if run.out.name == style and arguments[-1] == step:
            monkeypatch.setattr(StyleRun, name, original)
            raise Killed
        original(run, *arguments)

    monkeypatch.setattr(StyleRun, name, die)


# What each has of it.


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.usefixtures("small")
def test_train_styles_gives_each_what_it_has_alone(
    generated_photos: Path, styles: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    config = small_config(generated_photos, f"train.precision={precision}", "train.samples=1")
    train_each(config, styles, tmp_path / "alone")
    messages = train_together(config, styles, tmp_path / "together")
    finals = set()
    for name in styles:
        assert_same_outcome(tmp_path / "together" / name, tmp_path / "alone" / name)
        finals.add(logged(tmp_path / "together" / name)[-1]["loss/style"])
    assert len(finals) == len(styles)
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
    sizes = ("data.image_size=32", "data.workers=1", "data.loader=pillow", "train.batch_size=2", "style.size=32")
    others = ("train.steps=2", "train.samples=0", "train.device=cpu", "visualize.every=0")
    options = {"data.folder": generated_photos, "loss.vgg": "random"}
    config = load_config(preset=preset, assignments=[*sizes, *others, *more], options=options, environment={})
    monkeypatch.setattr(snapshots, "training_graph", lambda *_, **__: GraphDef())
    two = dict(list(styles.items())[:2])
    train_each(config, two, tmp_path / "alone")
    train_together(config, two, tmp_path / "together")
    for name in two:
        assert_same_outcome(tmp_path / "together" / name, tmp_path / "alone" / name)


@pytest.mark.usefixtures("small")
def test_train_styles_computes_content_features_once(
    generated_photos: Path, styles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    original = FusedPerceptualLoss.content_targets

    def counted(self: FusedPerceptualLoss, content: torch.Tensor) -> dict[str, torch.Tensor]:
        passes.append(len(content))
        return original(self, content)

    monkeypatch.setattr(FusedPerceptualLoss, "content_targets", counted)
    stages: list[int] = []
    make = NetTrainer.__init__

    def noted(self: NetTrainer, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        assert self._engine is not None
        stages.append(id(self._engine._stages))

    monkeypatch.setattr(NetTrainer, "__init__", noted)
    train_together(small_config(generated_photos), styles, tmp_path)
    assert passes == [2] * 5
    assert len(stages) == 3
    assert len(set(stages)) == 1


# Interrupted runs.


@pytest.mark.parametrize(("style", "step"), [(NAMES[0], 2), (NAMES[1], 4), (NAMES[2], 5)])
@pytest.mark.usefixtures("small")
def test_train_styles_resumes_after_a_kill_between_two_saves(
    generated_photos: Path,
    styles: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    style: str,
    step: int,
) -> None:
    """Also where only one checkpoint is kept, so that the styles have none in common."""
    config = small_config(generated_photos, "train.keep_checkpoints=1")
    train_together(config, styles, tmp_path / "whole")
    kill_at(monkeypatch, style, step)
    with pytest.raises(Killed):
        train_together(config, styles, tmp_path / "parts")
    before = {2: 0, 4: 2, 5: 4}[step]
    saved = [max(checkpoint_steps(tmp_path / "parts" / name), default=0) for name in styles]
    assert saved == [step if NAMES.index(name) < NAMES.index(style) else before for name in NAMES]
    messages = train_together(config, styles, tmp_path / "parts", resume=True)
    assert any(m.startswith(f"resuming at step {before}" if before else "training: 3 styles") for m in messages)
    for name in styles:
        assert_same_outcome(tmp_path / "parts" / name, tmp_path / "whole" / name)


@pytest.mark.usefixtures("small")
def test_train_styles_resume_leaves_a_finished_style_as_it_is(
    generated_photos: Path, styles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(generated_photos)
    kill_at(monkeypatch, NAMES[1], 5)
    with pytest.raises(Killed):
        train_together(config, styles, tmp_path)
    first = tmp_path / NAMES[0]
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    messages = train_together(config, styles, tmp_path, resume=True)
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert [logged(tmp_path / name)[-1]["step"] for name in styles] == [5, 5, 5]
    messages = train_together(config, styles, tmp_path, resume=True)
    assert messages[-1].startswith("nothing to do: 5 of 5 steps are done")


@pytest.mark.usefixtures("small")
def test_train_styles_saves_all_at_the_same_step_on_a_signal(
    generated_photos: Path, styles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    original = NetTrainer.train_step

    def ask(self: NetTrainer, step: int, *arguments: Any) -> Any:
        if step == 3:
            stop.signum = signal.SIGTERM
        return original(self, step, *arguments)

    monkeypatch.setattr(NetTrainer, "train_step", ask)
    config = small_config(generated_photos)
    with pytest.raises(StoppedBySignal, match=r"stopped at step 3 of 5.*fastnst train --resume --out \S+parts$"):
        train_together(config, styles, tmp_path / "parts", stop=stop)
    assert [max(checkpoint_steps(tmp_path / "parts" / name)) for name in styles] == [3, 3, 3]
    monkeypatch.setattr(NetTrainer, "train_step", original)
    train_together(config, styles, tmp_path / "parts", resume=True)
    train_together(config, styles, tmp_path / "whole")
    for name in styles:
        assert torch.equal(
            load_file(tmp_path / "parts" / name / "model.safetensors")["conv1.weight"],
            load_file(tmp_path / "whole" / name / "model.safetensors")["conv1.weight"],
        )


@pytest.mark.usefixtures("small")
def test_train_styles_resumes_a_style_that_went_on_alone(
    generated_photos: Path, styles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(generated_photos)
    kill_at(monkeypatch, NAMES[0], 4)
    with pytest.raises(Killed):
        train_together(config, styles, tmp_path)
    style = config.style.model_copy(update={"image": styles[NAMES[1]]})
    train_small(config.model_copy(update={"style": style}), tmp_path / NAMES[1], resume=True)
    assert checkpoint_steps(tmp_path / NAMES[1])[-1] == 5
    assert any(m.startswith("resuming at step 2") for m in train_together(config, styles, tmp_path, resume=True))
    train_together(config, styles, tmp_path / "whole")
    for name in styles:
        assert_same_outcome(tmp_path / name, tmp_path / "whole" / name)


@pytest.mark.usefixtures("small")
def test_train_styles_resumes_after_a_kill_before_all_have_begun(
    generated_photos: Path, styles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = StyleRun.prepare

    def die(run: StyleRun, *arguments: Any, **options: Any) -> Any:
        if run.out.name == dying[0]:
            raise Killed
        return prepare(run, *arguments, **options)

    monkeypatch.setattr(StyleRun, "prepare", die)
    config = small_config(generated_photos)
    dying = [NAMES[0]]
    with pytest.raises(Killed):
        train_together(config, styles, tmp_path / "parts")
    assert not list((tmp_path / "parts").rglob(CONFIG_NAME))
    dying = [NAMES[1]]
    # None has begun: that is no run yet, and nothing is lost by beginning anew.
    with pytest.raises(Killed):
        train_together(config, styles, tmp_path / "parts")
    assert len(list((tmp_path / "parts").rglob(CONFIG_NAME))) == 1
    with pytest.raises(UserError, match=r"holds runs of the styles image_00, image_01, image_02; go on with"):
        train_together(config, styles, tmp_path / "parts")
    dying = []
    dying.append("")
    train_together(config, styles, tmp_path / "parts", resume=True)
    train_together(config, styles, tmp_path / "whole")
    for name in styles:
        assert_same_outcome(tmp_path / "parts" / name, tmp_path / "whole" / name)


@pytest.mark.usefixtures("small")
def test_train_styles_lists_a_failed_image_for_each_style(
    photo_folder: Path, styles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And taken from any of the lists when the run goes on: the process may have been killed between two of them."""

    def opening(*arguments: Any, **options: Any) -> Any:
        (photo_folder / "image_07.png").unlink(missing_ok=True)
        return open_loader(*arguments, **options)

    config = small_config(photo_folder, "train.steps=12", "train.samples=0", f"style.image={styles[NAMES[0]]}")
    monkeypatch.setattr(trainer, "open_loader", opening)
    messages = train_together(config, styles, tmp_path / "runs")
    failed = [read_failures(tmp_path / "runs" / name / REJECTED_NAME) for name in styles]
    assert [failure.entry.path for failure in failed[0]] == ["image_07.png"]
    assert failed[0] == failed[1] == failed[2]
    assert sum("image_07.png failed in step" in message for message in messages) == 1
    (tmp_path / "runs" / NAMES[0] / REJECTED_NAME).write_text("")
    train_together(config, styles, tmp_path / "runs", resume=True)
    assert read_failures(tmp_path / "runs" / NAMES[0] / REJECTED_NAME) == failed[0]


@pytest.mark.usefixtures("small")
def test_train_styles_stops_all_if_one_diverges(
    generated_photos: Path, styles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = NetTrainer.train_step
    bad: list[NetTrainer] = []

    def poison(self: NetTrainer, step: int, *arguments: Any) -> Any:
        bad.append(self)
        if step == 4 and self is bad[1]:
            self.net.conv1.weight.data[0, 0, 0, 0] = float("nan")
        return original(self, step, *arguments)

    monkeypatch.setattr(NetTrainer, "train_step", poison)
    with pytest.raises(DivergedError, match=r"training diverged: .*image_01/checkpoints/step_00000002.*NAME"):
        train_together(small_config(generated_photos), styles, tmp_path)
    for name in styles:
        checkpoint = latest_checkpoint(tmp_path / name)
        assert checkpoint is not None
        assert checkpoint.step == 2
        assert all(torch.isfinite(t).all() for t in checkpoint.tensors.values())


@pytest.mark.usefixtures("small")
def test_train_styles_says_what_is_saved_if_the_storage_refuses(
    generated_photos: Path, styles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StyleRun._save_checkpoint

    def refuse(run: StyleRun, step: int) -> None:
        if run.out.name == NAMES[2] and step == 4:
            raise StorageError("cannot write it: No space left on device")
        original(run, step)

    monkeypatch.setattr(StyleRun, "_save_checkpoint", refuse)
    with pytest.raises(StorageError, match=r"step 2 is the last that is saved of all styles; go on with fastnst train"):
        train_together(small_config(generated_photos), styles, tmp_path)


@pytest.mark.usefixtures("small")
def test_train_styles_locks_each_run_directory(generated_photos: Path, styles: dict[str, Path], tmp_path: Path) -> None:
    config = small_config(generated_photos)
    train_together(config, styles, tmp_path)
    for owned in (tmp_path, tmp_path / NAMES[2]):
        with lock_run(owned), pytest.raises(UserError, match=f"{owned} is in use by another fastnst process"):
            train_together(config, styles, tmp_path, resume=True)
    train_together(config, styles, tmp_path, resume=True)


# What is refused.


def test_style_names_are_stems_and_differ() -> None:
    assert style_names([Path("a/wave.jpg"), Path("b/scream.png")]) == {
        "wave": Path("a/wave.jpg"),
        "scream": Path("b/scream.png"),
    }
    with pytest.raises(UserError, match=r"b/wave\.png would have the same run directory as a/wave\.jpg: 'wave'"):
        style_names([Path("a/wave.jpg"), Path("b/wave.png")])
    with pytest.raises(UserError, match=r"the same run directory as itself: 'wave'; give each style once"):
        style_names([Path("a/wave.jpg"), Path("a/wave.jpg")])


@pytest.mark.usefixtures("small")
def test_train_styles_refuses_folders_that_hold_something_else(
    generated_photos: Path, styles: dict[str, Path], tmp_path: Path
) -> None:
    config = small_config(generated_photos)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine is not empty \(it holds 'notes.txt'\)"):
        train_together(config, styles, tmp_path / "mine")
    train_small(config, tmp_path / "one")
    for resume in (False, True):
        with pytest.raises(UserError, match="one holds the run of one style, and 3 are given; choose another --out"):
            train_together(config, styles, tmp_path / "one", resume=resume)
    with pytest.raises(UserError, match=r"nothing holds no styles to resume \(styles.json is missing\)"):
        train_together(config, styles, tmp_path / "nothing", resume=True)
    train_together(config, styles, tmp_path / "three")
    with pytest.raises(UserError, match=r"three is not empty"):
        train_small(config, tmp_path / "three")
    two = {name: styles[name] for name in NAMES[:2]}
    with pytest.raises(UserError, match=r"begun with the styles image_00, image_01, image_02, and image_00,"):
        train_together(config, two, tmp_path / "three", resume=True)
    with pytest.raises(UserError, match=r"train\.learning_rate was"):
        train_together(
            small_config(generated_photos, "train.learning_rate=0.5"), styles, tmp_path / "three", resume=True
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "one", "three"]


@pytest.mark.usefixtures("small")
def test_train_styles_refuses_a_broken_style_image(
    generated_photos: Path, styles: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "broken.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        train_together(small_config(generated_photos), styles | {"broken": tmp_path / "broken.jpg"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{}",
        b'{"a": 1}',
        b'{"..": "/x.jpg"}',
        b'{"a/b": "/x.jpg"}',
        b'{".": "/x.jpg"}',
        b"\xff",
        b"[" * 100_000,
        b'{"a": "' + b"x" * (1 << 22) + b'"}',
    ],
    ids=range(9),
)
def test_saved_styles_refuses_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STYLES_NAME).write_bytes(content)
    with pytest.raises(DataError, match=r"styles\.json is damaged; go on with each style by fastnst train --resume"):
        saved_styles(tmp_path)


# The command line.

Fastnst = Callable[..., tuple[int, str, str]]


def arguments_for(styles: dict[str, Path], photos: Path, *more: object) -> list[object]:
    sets = [word for assignment in ASSIGNMENTS for word in ("--set", assignment)]
    given = [word for image in styles.values() for word in ("--style", image)]
    return ["train", *given, "--data", photos, "--preset", "vgg-conv3", "--vgg", "random", *sets, *more]


@pytest.mark.usefixtures("small")
def test_train_command_trains_and_resumes_several_styles(
    photo_folder: Path, tmp_path: Path, fastnst: Fastnst, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    styles = {}
    for name in NAMES[:2]:
        styles[name] = Path(shutil.copy(next(photo_folder.glob(f"{name}.*")), images))
    code, out, err = fastnst(*arguments_for(styles, photo_folder))
    assert code == 0, err
    folder = Path("runs/image_00+image_01")
    assert out.splitlines() == [
        *(f"style model      {folder / name / 'model.safetensors'}" for name in styles),
        f"TensorBoard log  {folder}",
    ]
    assert f"fastnst tensorboard {folder}; use it: fastnst stylize {folder / 'image_00'} IMAGE" in err
    assert json.loads((folder / STYLES_NAME).read_text()) == {name: str(path) for name, path in styles.items()}
    code, out, err = fastnst("stylize", folder, styles[NAMES[0]], "--out", tmp_path / "painted.png")
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


@pytest.mark.usefixtures("small")
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


def test_estimate_counts_every_network(generated_photos: Path) -> None:
    config = small_config(generated_photos, "train.precision=fp32")
    one, three = (estimate(config, device_type="cpu", styles=count) for count in (1, 3))
    # Weights, gradients and two moments of each further net, and three of these in each checkpoint.
    net = (one.disk - 0) // (3 * (config.train.keep_checkpoints + 1) + 1)
    assert three.weights - one.weights == 2 * 4 * net
    assert three.disk == 3 * one.disk
    assert three.activations == one.activations
