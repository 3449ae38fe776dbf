"""The log of a run: what a resumed run keeps of it, values JSON cannot hold, and storage that refuses."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastnst.config import load_config
from fastnst.errors import DataError
from fastnst.losses import LossTerms
from fastnst.summaries import RunLog, loss_scalars, read_metrics


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def scalars(run: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_loss_scalars_name_every_term() -> None:
    terms = LossTerms(*(torch.tensor(value) for value in (6.0, 1.0, 3.0, 2.0)), {"style/relu1_1": torch.tensor(3.0)})
    assert loss_scalars(terms) == {
        "loss/total": 6.0,
        "loss/content": 1.0,
        "loss/style": 3.0,
        "loss/tv": 2.0,
        "loss/style/relu1_1": 3.0,
    }


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in (1, 2, 3, 4):
            log.metrics(step, {"loss/total": float(step)})
    with RunLog(tmp_path, start_step=2) as log:
        for step in (3, 4, 5):
            log.metrics(step, {"loss/total": 10.0 * step})
    expected = {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0, 5: 50.0}
    assert {row["step"]: row["loss/total"] for row in read_metrics(tmp_path)} == expected
    assert scalars(tmp_path, "loss/total") == expected


def test_a_line_cut_by_a_crash_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 1.0}\n{"step": 2, "loss/to')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    with RunLog(tmp_path, start_step=1) as log:
        log.metrics(2, {"loss/total": 2.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_foreign_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(DataError, match="not a metrics file"):
        RunLog(tmp_path, start_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n'


def test_what_json_cannot_hold_is_null(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.metrics(1, {"loss/total": float("nan"), "loss/tv": float("inf"), "loss/style": 1.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "loss/total": None,
        "loss/tv": None,
        "loss/style": 1.5,
    }


def test_weights_beyond_the_last_bin_make_a_histogram(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.fill_(1e30)
    with RunLog(tmp_path) as log:
        log.histograms(3, net)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (histogram,) = events.Histograms("weight")
    assert histogram.step == 3
    assert histogram.histogram_value.num == 4


def test_the_configuration_is_a_text_page(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.config(load_config(environment={}))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (text,) = events.Tensors("config/text_summary")
    assert b'preset = "hwalsuklee"' in text.tensor_proto.string_val[0]


def test_a_full_disk_is_said_once_and_without_a_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture = torch.rand(1, 3, 64, 64)

    def write() -> None:
        with RunLog(tmp_path) as log:
            for step in range(50):
                log.pictures(step, "stylised", picture, ["noise"])
                log.flush()

    with largest_file(20_000), pytest.raises(DataError, match=f"cannot write {tmp_path}") as raised:
        write()
    assert raised.value.exit_code == 3
    assert "Traceback" not in capfd.readouterr().err
