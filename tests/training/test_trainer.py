"""Training end to end, at sizes a test can afford: what a run leaves, resuming, stopping, diverging."""

import functools
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastnst.config import Config, load_config
from fastnst.errors import DataError, DivergedError, StoppedBySignal, UserError
from fastnst.run_log.writer import RunLog, read_metrics
from fastnst.training import determinism
from fastnst.training.inputs import read_manifest, total_steps
from fastnst.training.run_dir.checkpoint import latest_checkpoint
from fastnst.training.signals import StopRequest
from fastnst.training.step.train_step import TrainingStep
from fastnst.training.trainer import train

Configure = Callable[..., Config]


@pytest.fixture
def configure(photo_folder: Path) -> Configure:
    """A run small enough for a test: two 32 px images a step, a shallow random VGG19, Pillow in one process."""

    def configure(*assignments: str, preset: str = "vgg-conv3") -> Config:
        small = ("data.image_size=32", "train.batch_size=2", "data.workers=1", "data.loader=pillow", "train.steps=6")
        log = ("train.log_every=2", "train.sample_every=3", "train.samples=2", "style.size=48", "train.device=cpu")
        # Projections take longer than these steps; `test_looks.py` has them on.
        log += ("visualize.every=0",)
        options = {
            "data.folder": photo_folder,
            "style.image": photo_folder / "image_00.jpg",
            "loss.vgg": "random",
        }
        return load_config(preset=preset, assignments=[*small, *log, *assignments], options=options, environment={})

    return configure


def run(
    config: Config, out: Path, *, resume: bool = False, allow_changes: bool = False, stop: StopRequest | None = None
) -> list[str]:
    """Train; returns what a user was told."""
    messages: list[str] = []
    train(config, out, resume=resume, allow_changes=allow_changes, notify=messages.append, stop=stop)
    return messages


@dataclass
class GraphedStep:
    """The steps that were begun, in order, and a signal that arrives in the middle of one."""

    calls: list[int] = field(default_factory=list)
    stop: StopRequest = field(default_factory=StopRequest)
    stop_at: int | None = None


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> GraphedStep:
    steps = GraphedStep()
    original = TrainingStep.__call__

    def counting(self: TrainingStep, step: int, batch: torch.Tensor) -> object:
        steps.calls.append(step)
        if step == steps.stop_at:
            steps.stop.signum = signal.SIGINT
        return original(self, step, batch)

    class OfNoRun(TrainingStep):
        """Steps that find out what determinism costs are none of the run's."""

        __call__ = original

    monkeypatch.setattr(TrainingStep, "__call__", counting)
    monkeypatch.setattr(determinism, "TrainingStep", OfNoRun)
    return steps


def test_a_run_leaves_all_that_it_promises(configure: Configure, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = configure("train.checkpoint_every=4", "train.keep_checkpoints=2")
    run(config, out)

    assert load_config(file=out / "config.toml", environment={}).data == config.data
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    terms = {"loss/total", "loss/content", "loss/style", "loss/tv", "loss/content/relu3_3", "loss/style/relu1_1"}
    speeds = {"speed/images_per_second", "speed/data_wait_percent", "train/learning_rate"}
    for row in rows:
        assert terms | speeds <= row.keys()
        assert row["loss/total"] == pytest.approx(row["loss/content"] + row["loss/style"] + row["loss/tv"], rel=1e-5)
        layers = [value for tag, value in row.items() if tag.startswith("loss/style/")]
        assert row["loss/style"] == pytest.approx(sum(layers), rel=1e-5)
        assert len(layers) == 4

    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    with safe_open(out / "model.safetensors", framework="pt") as model:
        metadata = model.metadata()
    assert metadata["steps"] == "6"
    assert metadata["preset"] == "vgg-conv3"
    assert metadata["style"] == "image_00.jpg"
    assert (out / "rejected.jsonl").read_text() == ""


def test_tensorboard_gets_scalars_histograms_and_images(configure: Configure, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(configure(), out)
    events = EventAccumulator(str(out), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert {"loss/total", "loss/style/relu3_4", "speed/images_per_second"} <= set(tags["scalars"])
    assert {"conv1/weight", "conv1/scale", "conv1/shift", "res5/conv2/weight", "out/weight"} <= set(tags["histograms"])
    assert [event.step for event in events.Histograms("conv1/weight")] == [0, 3, 6]
    assert {"style/image", "content/image_00", "stylised/image_01"} <= set(tags["images"])
    assert [event.step for event in events.Images("stylised/image_00")] == [0, 3, 6]
    rows = {row["step"]: row["loss/total"] for row in read_metrics(out)}
    charted = {event.step: event.value for event in events.Scalars("loss/total")}
    assert charted == pytest.approx(rows, rel=1e-6)


def test_the_loss_falls(configure: Configure, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(configure("train.steps=40", "train.log_every=1", "train.sample_every=1000", "loss.tv_weight=0"), out)
    losses = [row["loss/total"] for row in read_metrics(out)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


# `test_resume.py` and `test_crash.py` stop small runs at every step.
@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.campaign), 3, pytest.param(5, marks=pytest.mark.campaign)]
)
@pytest.mark.parametrize(
    "variant",
    [
        ("data.loader=pillow",),
        ("data.loader=dali", "model.norm=batch"),
        # `test_resume.py` has the scaler's part of it, `test_determinism.py` the other's, both quicker.
        pytest.param(("train.precision=fp16", "train.deterministic=true"), marks=pytest.mark.campaign),
    ],
    ids=["pillow", "dali-batch-norm", "fp16-deterministic"],
)
def test_resumed_equals_uninterrupted_to_the_last_bit(
    configure: Configure, tmp_path: Path, steps: GraphedStep, step: int, variant: tuple[str, ...]
) -> None:
    config = configure(*variant)
    run(config, tmp_path / "whole")
    steps.calls.clear()
    steps.stop_at = step
    with pytest.raises(StoppedBySignal, match=f"stopped at step {step} of 6.*--resume") as stopped:
        run(config, tmp_path / "parts", stop=steps.stop)
    assert stopped.value.exit_code == 130
    messages = run(config, tmp_path / "parts", resume=True)
    assert any(f"resuming at step {step}" in message for message in messages)
    assert steps.calls == [1, 2, 3, 4, 5, 6]

    whole, parts = (latest_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert whole is not None
    assert parts is not None
    assert whole.tensors.keys() == parts.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, parts.tensors[name]), name
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    logged = [
        [(row["step"], row["loss/total"]) for row in read_metrics(tmp_path / name)] for name in ("whole", "parts")
    ]
    # The stop adds a row for its own step; all other rows are the same numbers.
    assert set(logged[0]) <= set(logged[1])


def test_a_real_ctrl_c_saves_and_the_resumed_run_ends_with_the_same_bits(configure: Configure, tmp_path: Path) -> None:
    config = configure()
    arguments = [
        *(
            "--style",
            str(config.style.image),
            "--data",
            str(config.data.folder),
            "--preset",
            "vgg-conv3",
            "--vgg",
            "random",
        ),
        *("--device", "cpu", "--set", "data.image_size=32", "--set", "train.batch_size=2", "--set", "data.workers=1"),
        *("--set", "style.size=48", "--set", "train.log_every=1", "--set", "train.samples=2"),
        *("--set", "visualize.every=0"),
    ]
    out = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastnst", "train", *arguments, "--steps", "400", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    stopped_at = read_metrics(out)[-1]["step"]
    total = int(stopped_at) + 2

    resumed = [sys.executable, "-m", "fastnst", "train", "--resume", "--out", str(out), "--steps", str(total)]
    subprocess.run(resumed, check=True, capture_output=True, timeout=120)
    whole = [
        sys.executable,
        "-m",
        "fastnst",
        "train",
        *arguments,
        "--steps",
        str(total),
        "--out",
        str(tmp_path / "whole"),
    ]
    subprocess.run(whole, check=True, capture_output=True, timeout=120)
    models = [load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole")]
    assert models[0].keys() == models[1].keys()
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name]), name


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    configure: Configure, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(configure("train.steps=2"), out)
    # Adam's first step moves each weight by the learning rate: this one overflows fp32 within a few.
    wild = configure("train.steps=9", "train.learning_rate=1e30")
    with pytest.raises(DivergedError, match=r"not finite.*step_00000002.*lower learning rate") as raised:
        run(wild, out, resume=True, allow_changes=True)
    assert raised.value.exit_code == 4
    checkpoint = latest_checkpoint(out)
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.tensors.values())
    assert all(torch.isfinite(tensor).all() for tensor in load_file(out / "model.safetensors").values())
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_resuming_names_what_differs(configure: Configure, tmp_path: Path, photo_folder: Path) -> None:
    out = tmp_path / "run"
    run(configure("train.steps=2"), out)
    with pytest.raises(
        UserError, match=r"content_weight was 2.0, is now 3.0; train.learning_rate was 0.003, is now 0.01"
    ):
        run(configure("train.learning_rate=0.01", "loss.content_weight=3"), out, resume=True)
    (photo_folder / "image_03.jpg").unlink()
    with pytest.raises(DataError, match="the images in the data folder changed"):
        run(configure("train.steps=3"), out, resume=True)


def test_a_signal_during_the_last_part_of_a_step_ends_the_next_one(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the moment, the message "which is saved" is true."""
    stop = StopRequest()
    original = RunLog.histograms

    def interrupted(self: RunLog, step: int, net: torch.nn.Module) -> None:
        original(self, step, net)
        if step == 3:
            stop.signum = signal.SIGTERM

    monkeypatch.setattr(RunLog, "histograms", interrupted)
    with pytest.raises(StoppedBySignal, match="stopped at step 4 of 6, which is saved") as stopped:
        run(configure(), tmp_path / "run", stop=stop)
    assert stopped.value.exit_code == 143
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.step == 4


def test_a_longer_run_goes_on_where_the_shorter_one_ended(configure: Configure, tmp_path: Path) -> None:
    run(configure("train.steps=3"), tmp_path / "run")
    run(configure("train.steps=5"), tmp_path / "run", resume=True)
    assert load_config(file=tmp_path / "run" / "config.toml", environment={}).train.steps == 5
    (message,) = [text for text in run(configure("train.steps=5"), tmp_path / "run", resume=True) if "steps" in text]
    assert message.startswith("nothing to do: 5 of 5 steps are done")
    run(configure("train.steps=5"), tmp_path / "whole")
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_new_run_needs_an_empty_directory(configure: Configure, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(configure("train.steps=1"), out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds another run; go on with it by --resume"):
        run(configure("train.steps=1"), out)
    assert (out / "model.safetensors").read_bytes() == before
    other = tmp_path / "letters"
    other.mkdir()
    (other / "dear.txt").write_text("x")
    with pytest.raises(UserError, match=r"not empty \(it holds 'dear.txt'\)"):
        run(configure(), other)
    with pytest.raises(UserError, match="no run to resume"):
        run(configure(), tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_follows_fp32(configure: Configure, tmp_path: Path, precision: str) -> None:
    run(configure("train.steps=3", "train.log_every=1"), tmp_path / "fp32")
    run(configure("train.steps=3", "train.log_every=1", f"train.precision={precision}"), tmp_path / precision)
    exact, reduced = ([row["loss/total"] for row in read_metrics(tmp_path / name)] for name in ("fp32", precision))
    # bf16 keeps 8 bits: 2⁻⁸ per rounding, over some twenty layers.
    assert reduced[0] == pytest.approx(exact[0], rel=0.05)
    assert all(math.isfinite(loss) for loss in reduced)
    assert ("train/loss_scale" in read_metrics(tmp_path / precision)[0]) == (precision == "fp16")


@pytest.mark.parametrize("preset", ["hwalsuklee", "lengstrom", "johnson"])
def test_every_preset_trains(configure: Configure, tmp_path: Path, preset: str) -> None:
    run(configure("train.steps=2", "train.sample_every=10", preset=preset), tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss/total"]) for row in rows)


# What the compiler does inside is deprecated in places.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_takes_the_whole_step_in_one_graph(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Capturing and differentiating is ours to get right; generating C++ is the compiler's, and takes minutes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    for name in ("false", "true"):
        run(
            configure("train.steps=2", "train.log_every=1", "train.samples=0", f"train.compile={name}"), tmp_path / name
        )
    plain, compiled = ([row["loss/total"] for row in read_metrics(tmp_path / name)] for name in ("false", "true"))
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_broken_images_are_named_and_training_goes_on(configure: Configure, tmp_path: Path, photo_folder: Path) -> None:
    (photo_folder / "notes.jpg").write_text("not an image")
    messages = run(configure("train.steps=2"), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == ["notes.jpg"]
    assert rows[0]["reason"]
    assert any("1 of 13 images refused" in message for message in messages)


def test_a_image_of_one_colour_is_not_trained_on(configure: Configure, photo_folder: Path) -> None:
    Image.new("RGB", (64, 48), "teal").save(photo_folder / "flat.png")
    manifest = read_manifest(configure(), lambda _: None)
    assert len(manifest.images) == 12
    (refused,) = manifest.rejected
    assert refused.path == "flat.png"
    assert "one colour" in refused.reason


def test_fewer_images_than_one_batch_are_refused(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.batch_size is 13, and .* holds 12 usable images") as refused:
        run(configure("train.batch_size=13"), tmp_path / "run")
    assert str(refused.value).endswith("add some, or use --set train.batch_size=12 or less")
    assert not (tmp_path / "run").exists()


def test_steps_follow_from_epochs() -> None:
    config = load_config(assignments=["train.epochs=2", "train.batch_size=4"], environment={}).train
    assert total_steps(config, 118_287) == 59_144
    assert total_steps(config, 1) == 1
    assert total_steps(config.model_copy(update={"steps": 7}), 118_287) == 7
