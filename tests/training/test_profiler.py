"""`--profile N`: which steps are traced, what the trace holds, and what is logged about it."""

import gzip
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from fastnst.cli.main import cli
from fastnst.errors import StoppedBySignal, UserError
from fastnst.training.monitoring.profiler import record_span
from fastnst.training.signals import StopRequest
from fastnst.training.train import train
from helpers.tiny_runs import before_each_step, log_messages, make_small, small_arguments, small_config, train_small

SPANS = {"data wait", "transform net", "loss network", "backward", "optimiser", "logging", "samples and checkpoints"}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def traces(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Name → events of each trace that a run left."""
    found = {}
    for file in sorted(run.glob("profile/*")):
        with gzip.open(file, "rt", encoding="utf-8") as text:
            found[file.name] = json.load(text)["traceEvents"]
    return found


def names(events: list[dict[str, Any]]) -> list[str]:
    return [event.get("name", "") for event in events]


def traced_steps(events: list[dict[str, Any]]) -> int:
    return len({name for name in names(events) if name.startswith("ProfilerStep#")})


def test_profile_traces_steady_steps_with_their_spans(generated_photos: Path, tmp_path: Path) -> None:
    messages = train_small(small_config(generated_photos, "train.steps=18"), tmp_path / "run", profile=3)
    (name, events), *others = traces(tmp_path / "run").items()
    assert not others
    assert name == "steps_14_to_16.pt.trace.json.gz"  # after 10 that are left out and 3 to warm up
    assert traced_steps(events) == 3
    counts = {span: names(events).count(span) for span in SPANS}
    assert counts == dict.fromkeys(SPANS, 3)
    assert any("convolution_backward" in name for name in names(events))
    path = tmp_path / "run" / "profile" / name
    assert f"profile: a trace of 3 steps is in {path}; open it at https://ui.perfetto.dev" in messages[-1]


@pytest.mark.parametrize(
    ("steps", "asked", "file", "count"),
    [(5, 2, "steps_4_to_5", 2), (2, 7, "steps_1_to_2", 2), (1, 1, "steps_1_to_1", 1)],
)
def test_profile_traces_short_runs_as_far_as_they_go(
    generated_photos: Path, tmp_path: Path, steps: int, asked: int, file: str, count: int
) -> None:
    config = small_config(generated_photos, f"train.steps={steps}")
    messages = train_small(config, tmp_path / "run", profile=asked)
    ((name, events),) = traces(tmp_path / "run").items()
    assert name == f"{file}.pt.trace.json.gz"
    assert traced_steps(events) == count
    assert f"({asked} were asked for)" in messages[-1] or asked == count


def test_profile_of_a_resumed_run_traces_its_own_steps(generated_photos: Path, tmp_path: Path) -> None:
    train_small(small_config(generated_photos), tmp_path / "run", profile=1)
    config = small_config(generated_photos, "train.steps=8")
    train_small(config, tmp_path / "run", profile=2, resume=True)
    assert list(traces(tmp_path / "run")) == ["steps_5_to_5.pt.trace.json.gz", "steps_7_to_8.pt.trace.json.gz"]


@pytest.mark.parametrize(("steps", "asked"), [(30, 3), (6, 4)])
def test_profile_of_a_stopped_run_says_what_there_is(
    generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, asked: int
) -> None:
    stop = StopRequest()
    before_each_step(monkeypatch, lambda _, step: setattr(stop, "signum", signal.SIGTERM if step == 4 else None))
    config = small_config(generated_photos, f"train.steps={steps}")
    with log_messages() as messages, pytest.raises(StoppedBySignal, match="stopped at step 4"):
        train(config, tmp_path / "run", stop=stop, profile=asked)
    if steps == 30:
        assert list(traces(tmp_path / "run")) == []
        assert "profile: no trace, since the run ended at or before step 13" in messages[-1]
    else:
        assert list(traces(tmp_path / "run")) == ["steps_3_to_4.pt.trace.json.gz"]
        assert "a trace of 2 steps" in messages[-1]
        assert "(4 were asked for)" in messages[-1]


def test_record_span_does_nothing_without_a_profile(generated_photos: Path, tmp_path: Path) -> None:
    train_small(small_config(generated_photos, "train.steps=1"), tmp_path / "run")
    assert not (tmp_path / "run" / "profile").exists()
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
        record_span("mine"),
    ):
        torch.ones(1)
    assert "mine" not in [event.name for event in profiler.events()]


def test_profile_that_cannot_be_written_does_not_end_training(generated_photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_small(small_config(generated_photos, "train.steps=2"), run)
    (run / "profile").write_text("in the way")
    config = small_config(generated_photos, "train.steps=4")
    messages = train_small(config, run, profile=1, resume=True)
    assert "profile: no trace: cannot write" in messages[-1]
    assert (run / "checkpoints" / "step_00000004").is_dir()


def test_profile_of_no_steps_is_refused(generated_photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a profile of 0 steps was asked for; give --profile 1 or more"):
        train(small_config(generated_photos), tmp_path / "run", profile=0)
    result = CliRunner().invoke(cli, [*small_arguments(generated_photos, tmp_path / "run"), "--profile", "0"])
    assert result.exit_code == 2
    assert "'--profile': 0 is not in the range x>=1" in result.output
    assert not (tmp_path / "run").exists()


def test_train_profile_names_the_file(generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    result = CliRunner().invoke(cli, [*small_arguments(generated_photos, tmp_path / "run"), "--profile", "2"])
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "run" / "profile" / "steps_4_to_5.pt.trace.json.gz") in result.output
