"""Training end to end, at sizes a test can afford: what a run leaves, and where it ends."""

import functools
import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastnst.config import Config, load_config
from fastnst.errors import StoppedBySignal, UserError
from fastnst.run_log.writer import read_metrics
from fastnst.training.signals import StopRequest
from fastnst.training.train import train
from helpers.run_comparison import assert_same_weights
from helpers.tiny_runs import (
    before_each_step,
    leave_out_graph,
    log_messages,
    make_small,
    newest,
    real_config,
    small_config,
    train_small,
)

Configure = Callable[..., Config]
ONE_IMAGE = ("train.steps=1", "train.samples=0", "data.image_size=16", "train.batch_size=1")


@pytest.fixture(scope="module")
def configure(generated_photos: Path) -> Configure:
    """A run of six steps of two 32 px images, with real networks and a shallow random VGG19."""

    def configure(*assignments: str, preset: str = "vgg-conv3") -> Config:
        small = ("data.image_size=32", "train.batch_size=2", "train.steps=6", "train.samples=2", "style.size=48")
        log = ("train.log_every=2", "train.sample_every=3", "train.checkpoint_every=4", "train.keep_checkpoints=2")
        return real_config(generated_photos, *small, *log, *assignments, preset=preset)

    return configure


@pytest.fixture
def no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_graph(monkeypatch)


@pytest.fixture(scope="module")
def finished_run(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train(configure(), out) == [out / "model.safetensors"]
    return out


def losses(run: Path) -> list[float]:
    return [row["loss/total"] for row in read_metrics(run)]


def test_train_leaves_config_metrics_checkpoints_and_model(configure: Configure, finished_run: Path) -> None:
    assert load_config(file=finished_run / "config.toml", environment={}).data == configure().data
    rows = read_metrics(finished_run)
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    terms = {"loss/total", "loss/content", "loss/style", "loss/tv", "loss/content/relu3_3", "loss/style/relu1_1"}
    speeds = {"speed/images_per_second", "speed/data_wait_percent", "train/learning_rate"}
    for row in rows:
        assert terms | speeds <= row.keys()
        assert row["loss/total"] == pytest.approx(row["loss/content"] + row["loss/style"] + row["loss/tv"], rel=1e-5)
        layers = [value for tag, value in row.items() if tag.startswith("loss/style/")]
        assert row["loss/style"] == pytest.approx(sum(layers), rel=1e-5)
        assert len(layers) == 4
    checkpoints = sorted(path.name for path in (finished_run / "checkpoints").iterdir())
    assert checkpoints == ["step_00000004", "step_00000006"]
    with safe_open(finished_run / "model.safetensors", framework="pt") as model:
        metadata = model.metadata()
    assert (metadata["steps"], metadata["preset"], metadata["style"]) == ("6", "vgg-conv3", "image_00.jpg")
    assert (finished_run / "rejected.jsonl").read_text() == ""


def test_train_logs_scalars_histograms_and_images(finished_run: Path) -> None:
    events = EventAccumulator(str(finished_run), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert {"loss/total", "loss/style/relu3_4", "speed/images_per_second"} <= set(tags["scalars"])
    assert {"conv1/weight", "conv1/scale", "conv1/shift", "res5/conv2/weight", "out/weight"} <= set(tags["histograms"])
    assert [event.step for event in events.Histograms("conv1/weight")] == [0, 3, 6]
    assert {"style/picture", "content/image_00", "stylised/image_01"} <= set(tags["images"])
    assert [event.step for event in events.Images("stylised/image_00")] == [0, 3, 6]
    charted = {event.step: event.value for event in events.Scalars("loss/total")}
    assert charted == pytest.approx({row["step"]: row["loss/total"] for row in read_metrics(finished_run)}, rel=1e-6)


@pytest.mark.usefixtures("no_graph")
def test_train_lowers_the_loss(configure: Configure, tmp_path: Path) -> None:
    train(configure(*ONE_IMAGE, "train.steps=12", "train.log_every=1", "loss.tv_weight=0"), tmp_path / "run")
    found = losses(tmp_path / "run")
    assert sum(found[-3:]) < 0.7 * sum(found[:3])


# `test_resume.py` stops small runs at every step; here the networks and loaders are real.
@pytest.mark.parametrize(
    "variant",
    [
        (),
        ("data.loader=dali", "model.norm=batch"),
        pytest.param(("train.precision=fp16", "train.deterministic=true"), marks=pytest.mark.campaign),
    ],
    ids=["pillow", "dali-batch-norm", "fp16-deterministic"],
)
@pytest.mark.usefixtures("no_graph")
def test_train_resume_equals_uninterrupted_to_the_last_bit(
    configure: Configure, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: tuple[str, ...]
) -> None:
    config, whole, parts = configure(*variant), finished_run, tmp_path / "parts"
    if variant:
        whole = tmp_path / "whole"
        train(config, whole)
    made: list[int] = []
    stop = StopRequest()

    def interrupt(_: object, step: int) -> None:
        made.append(step)
        if made == [1, 2, 3]:
            stop.signum = signal.SIGINT

    before_each_step(monkeypatch, interrupt)
    with pytest.raises(StoppedBySignal, match=r"stopped at step 3 of 6.*--resume") as stopped:
        train(config, parts, stop=stop)
    assert stopped.value.exit_code == 130
    with log_messages() as messages:
        train(config, parts, resume=True)
    assert any("resuming at step 3" in message for message in messages)
    assert made == [1, 2, 3, 4, 5, 6]

    torch.testing.assert_close(newest(parts).tensors, newest(whole).tensors, rtol=0, atol=0)
    assert_same_weights(parts, whole)
    logged = [{(row["step"], row["loss/total"]) for row in read_metrics(run)} for run in (whole, parts)]
    # The stop adds a row for its own step; all other rows are the same numbers.
    assert logged[0] <= logged[1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.usefixtures("no_graph")
def test_train_in_reduced_precision_follows_fp32(configure: Configure, tmp_path: Path, precision: str) -> None:
    train(configure(*ONE_IMAGE), tmp_path / "fp32")
    train(configure(*ONE_IMAGE, f"train.precision={precision}"), tmp_path / precision)
    exact, reduced = losses(tmp_path / "fp32"), losses(tmp_path / precision)
    # bf16 keeps 8 bits: 2⁻⁸ per rounding, over some twenty layers.
    assert reduced[0] == pytest.approx(exact[0], rel=0.05)
    assert all(math.isfinite(loss) for loss in reduced)
    assert ("train/loss_scale" in read_metrics(tmp_path / precision)[0]) == (precision == "fp16")


@pytest.mark.parametrize("preset", ["hwalsuklee", "lengstrom", "johnson"])
@pytest.mark.usefixtures("no_graph")
def test_train_with_every_preset(configure: Configure, tmp_path: Path, preset: str) -> None:
    train(configure(*ONE_IMAGE, preset=preset), tmp_path / "run")
    (loss,) = losses(tmp_path / "run")
    assert math.isfinite(loss)


# What the compiler does inside is deprecated in places.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("no_graph")
def test_train_compiled_takes_the_whole_step_in_one_graph(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Capturing and differentiating is ours to get right; generating C++ is the compiler's, and takes minutes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    for name in ("false", "true"):
        train(configure(*ONE_IMAGE, f"train.compile={name}"), tmp_path / name)
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-3)


# The loop, over one convolution.


@pytest.fixture
def tiny(generated_photos: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    make_small(monkeypatch)
    return functools.partial(small_config, generated_photos)


def test_train_resume_with_more_steps_goes_on(tiny: Configure, tmp_path: Path) -> None:
    train_small(tiny("train.steps=3"), tmp_path / "run")
    train_small(tiny(), tmp_path / "run", resume=True)
    assert load_config(file=tmp_path / "run" / "config.toml", environment={}).train.steps == 5
    (message,) = [text for text in train_small(tiny(), tmp_path / "run", resume=True) if "steps" in text]
    assert message.startswith("nothing to do: 5 of 5 steps are done")
    train_small(tiny(), tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_train_needs_an_empty_directory(tiny: Configure, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_small(tiny("train.steps=1"), out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds another run; go on with it by --resume"):
        train(tiny("train.steps=1"), out)
    assert (out / "model.safetensors").read_bytes() == before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("x")
    with pytest.raises(UserError, match=r"not empty \(it holds 'dear.txt'\)"):
        train(tiny(), tmp_path / "letters")
    with pytest.raises(UserError, match="no run to resume"):
        train(tiny(), tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_train_prints_only_progress_unless_logging_is_configured(
    tiny: Configure, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(tiny("train.precision=fp16"), tmp_path / "run")
    printed = capfd.readouterr()
    assert printed.out == ""
    assert all(line.startswith(("train: ", "check images: ")) for line in printed.err.splitlines()), printed.err
