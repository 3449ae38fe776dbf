"""The log of a run: its contents, what a resumed run keeps, NaN, full disks and links."""

import io
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from fastnst.config import load_config
from fastnst.errors import DataError
from fastnst.losses.perceptual import LossTerms
from fastnst.run_log.protos import METRICS, histogram, hyper_parameters
from fastnst.run_log.writer import RunLog, log_visualization, loss_scalars, read_metrics
from helpers.storage_faults import record_synced_sizes


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def read_events(run: Path) -> EventAccumulator:
    """What TensorBoard reads in a run directory, all of its files taken together."""
    events = EventAccumulator(str(run), size_guidance=dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0))
    events.Reload()
    return events


def scalars(run: Path, tag: str) -> dict[int, float]:
    events = read_events(run).Scalars(tag)
    assert len({event.step for event in events}) == len(events), "a step is there twice"
    return {event.step: event.value for event in events}


def test_loss_scalars_name_every_term() -> None:
    terms = LossTerms(*(torch.tensor(value) for value in (6.0, 1.0, 3.0, 2.0)), {"style/relu1_1": torch.tensor(3.0)})
    expected = {"loss/total": 6.0, "loss/content": 1.0, "loss/style": 3.0, "loss/tv": 2.0, "loss/style/relu1_1": 3.0}
    assert loss_scalars(terms) == expected


def test_run_log_resumed_has_each_step_once(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in (1, 2, 3, 4):
            log.metrics(step, {"loss/total": float(step)})
    with RunLog(tmp_path, start_step=2) as log:
        for step in (3, 4, 5):
            log.metrics(step, {"loss/total": 10.0 * step})
    expected = {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0, 5: 50.0}
    assert [(row["step"], row["loss/total"]) for row in read_metrics(tmp_path)] == list(expected.items())
    assert scalars(tmp_path, "loss/total") == expected


def test_run_log_flush_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLog(tmp_path) as log:
        log.metrics(1, {"loss/total": 1.0})
        sizes = record_synced_sizes(monkeypatch)
        log.flush()
        paths = [tmp_path / "metrics.jsonl", *tmp_path.glob("events.*")]
        # Each whole: nothing is written behind what was made durable.
        assert {path.stat().st_ino: path.stat().st_size for path in paths} == sizes
        assert [row["step"] for row in read_metrics(tmp_path)] == [1]
        assert scalars(tmp_path, "loss/total") == {1: 1.0}


def test_run_log_drops_a_line_cut_by_a_crash(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 1.0}\n{"step": 2, "loss/to')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    with RunLog(tmp_path, start_step=1) as log:
        log.metrics(2, {"loss/total": 2.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_run_log_keeps_rows_behind_a_byte_order_mark(tmp_path: Path) -> None:
    """An editor may have saved the file with one."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 1.0}\n', encoding="utf-8-sig")
    with RunLog(tmp_path, start_step=1) as log:
        log.metrics(2, {"loss/total": 2.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_run_log_refuses_a_foreign_metrics_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(DataError, match="not a metrics file"):
        RunLog(tmp_path, start_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 1}\n'


def test_metrics_writes_null_for_nan_and_inf(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.metrics(1, {"loss/total": float("nan"), "loss/tv": float("inf"), "loss/style": 1.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = {"step": 1, "loss/total": None, "loss/tv": None, "loss/style": 1.5}
    assert json.loads(line, parse_constant=pytest.fail) == expected


FLOATS = arrays.arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32))


@given(FLOATS)
def test_histogram_counts_finite_values(values: np.ndarray) -> None:
    finite = values[np.isfinite(values)].astype(np.float64)
    bins = histogram(values)
    if bins is None:
        assert not finite.size
        return
    assert bins["num"] == sum(bins["bucket_counts"]) == finite.size
    assert (bins["min"], bins["max"]) == (finite.min(), finite.max())
    assert bins["bucket_limits"][-1] == finite.max()
    assert sorted(set(bins["bucket_limits"])) == bins["bucket_limits"]
    assert len(bins["bucket_limits"]) == len(bins["bucket_counts"]) == (80 if finite.min() < finite.max() else 1)
    assert bins["sum"] == pytest.approx(finite.sum())


def test_histogram_by_hand() -> None:
    values = np.array([[0.0, 1.0, np.inf], [3.0, 1.0, np.nan]], dtype=np.float32)
    assert histogram(values, bins=3) == {
        **{"min": 0.0, "max": 3.0, "num": 4, "sum": 5.0, "sum_squares": 11.0},
        **{"bucket_limits": [1.0, 2.0, 3.0], "bucket_counts": [1, 2, 1]},
    }


def test_histograms_skip_nonfinite_weights(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.fill_(float("nan"))
    with RunLog(tmp_path) as log:
        log.histograms(3, net)
    assert read_events(tmp_path).Tags()["histograms"] == ["bias"]


def test_graph_round_trip(tmp_path: Path) -> None:
    graph = GraphDef()
    graph.node.add(name="X_content", op="Placeholder")
    graph.node.add(name="loss/total/add", op="add", input=["X_content"])
    with RunLog(tmp_path) as log:
        log.graph(graph)
    events = read_events(tmp_path)
    assert events.Tags()["graph"]
    assert events.Graph() == graph


def test_layout_has_one_chart_of_all_loss_terms(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.layout(("relu1_1", "relu3_3"))
    (event,) = read_events(tmp_path).Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts["all terms"] == ["^loss/total$", "^loss/content$", "^loss/style$", "^loss/tv$"]
    assert charts["style, by layer"] == ["^loss/style/relu1_1$", "^loss/style/relu3_3$"]
    assert charts["images per second"] == ["^speed/images_per_second$"]


def hparams(run: Path, tag: str) -> Any:
    content = read_events(run).SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
    return getattr(HParamsPluginData.FromString(content), tag)


def test_config_logs_text_and_hyper_parameters_in_the_run_itself(tmp_path: Path) -> None:
    config = load_config(options={"style.image": Path("/images/wave.jpg")}, environment={})
    with RunLog(tmp_path) as log:
        log.config(config)
        log.metrics(1, {"loss/total": 1.0})
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert len(list(tmp_path.glob("events.*"))) == 1
    (text,) = read_events(tmp_path).Tensors("config/text_summary")
    assert b'preset = "hwalsuklee"' in text.tensor_proto.string_val[0]
    values = hparams(tmp_path, "session_start_info").hparams
    assert values["loss.style_weight"].number_value == config.loss.style_weight
    assert values["model.architecture"].string_value == "hwalsuklee"
    assert values["data.flip"].WhichOneof("kind") == "bool_value"
    experiment = hparams(tmp_path, "experiment")
    assert {info.name for info in experiment.hparam_infos} == set(values)
    assert [info.name.tag for info in experiment.metric_infos] == list(METRICS)
    assert hparams(tmp_path, "session_end_info").end_time_secs >= experiment.time_created_secs


def test_hyper_parameters_change_the_result() -> None:
    options = {"style.image": Path("/images/wave.jpg"), "data.folder": Path("/images")}
    values = hyper_parameters(load_config(options=options, environment={}))
    assert values["preset"] == "hwalsuklee"
    assert values["style.image"] == "wave.jpg"
    assert values["loss.style_layers"] == "relu1_1, relu2_1, relu3_1, relu4_1, relu5_1"
    assert values["train.learning_rate"] == 1e-3
    assert not {"data.folder", "data.workers", "train.log_every", "style.size"} & set(values)


def test_run_log_marks_only_finished_runs(tmp_path: Path) -> None:
    def interrupted() -> None:
        with RunLog(tmp_path) as log:
            log.config(load_config(environment={}))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "_hparams_/session_end_info" not in read_events(tmp_path).Tags()["tensors"]
    with RunLog(tmp_path, start_step=1):
        pass
    assert hparams(tmp_path, "session_end_info").status == 1  # STATUS_SUCCESS


def test_images_round_trip(tmp_path: Path) -> None:
    image = torch.tensor([[-1.0, 0.0], [0.5, 2.0]]).expand(3, 2, 2)
    with RunLog(tmp_path) as log:
        log.images(1, "stylised", image[None], ["cat"])
        log.image(2, "strip/cat", image)
    events = read_events(tmp_path)
    for tag, step in (("stylised/cat", 1), ("strip/cat", 2)):
        (event,) = events.Images(tag)
        assert event.step == step
        assert np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))[..., 0].tolist() == [[0, 0], [128, 255]]


def test_log_visualization_writes_its_own_file_and_hides_nothing(tmp_path: Path) -> None:
    sheet = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    with RunLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.metrics(step, {"loss/total": float(step)})
        log.flush()
        log_visualization(tmp_path, {"deconvnet/cat": sheet, "deconvnet/dog": sheet}, step=2, text="strongest")
        log.metrics(4, {"loss/total": 4.0})
    (own,) = tmp_path.glob("events.*.visualize")
    events = read_events(own)
    assert set(events.Tags()["images"]) == {"deconvnet/cat", "deconvnet/dog"}
    (image,) = events.Images("deconvnet/cat")
    assert (image.step, image.width, image.height) == (2, 3, 2)
    assert np.asarray(Image.open(io.BytesIO(image.encoded_image_string))).tolist() == sheet.tolist()
    (text,) = events.Tensors("deconvnet/dog/text_summary")
    assert text.tensor_proto.string_val[0] == b"strongest"

    # Resuming at step 2 takes back what was written about later steps, in its own file only as far as it must.
    with RunLog(tmp_path, start_step=2) as log:
        log.metrics(3, {"loss/total": 30.0})
    assert scalars(tmp_path, "loss/total") == {1: 1.0, 2: 2.0, 3: 30.0}
    assert [event.step for event in read_events(tmp_path).Images("deconvnet/cat")] == [2]


def test_log_visualization_on_a_full_disk(tmp_path: Path) -> None:
    sheet = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    with largest_file(10_000), pytest.raises(DataError, match=f"cannot write {tmp_path}"):
        log_visualization(tmp_path, {"sheet": sheet}, step=1, text="")


@pytest.mark.parametrize("full", ["image", "metrics", "histograms", "config"])
def test_run_log_on_a_full_disk_fails_at_the_call_itself(tmp_path: Path, full: str) -> None:
    calls: dict[str, Callable[[RunLog], None]] = {
        "image": lambda log: log.image(1, "noise", torch.rand(3, 64, 64)),
        "metrics": lambda log: log.metrics(1, {"loss/total": 1.0}),
        "histograms": lambda log: log.histograms(1, torch.nn.Linear(2, 2)),
        "config": lambda log: log.config(load_config(environment={})),
    }
    with RunLog(tmp_path) as log:
        log.metrics(0, {"loss/total": 0.0})
        (events,) = tmp_path.glob("events.*")
        with largest_file(events.stat().st_size), pytest.raises(DataError, match=f"cannot write {tmp_path}") as raised:
            calls[full](log)
        assert raised.value.exit_code == 3
        # Space again: the log goes on, and holds what came before.
        log.metrics(2, {"loss/total": 2.0})
    assert {0: 0.0, 2: 2.0}.items() <= scalars(tmp_path, "loss/total").items()


def test_run_log_does_not_follow_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1_000.0)
    run = tmp_path / "run"
    run.mkdir()
    with RunLog(run):
        (events,) = run.glob("events.*")
    for path, name in ((events, "new"), (run / "metrics.jsonl", "other")):
        path.unlink()
        path.symlink_to(tmp_path / name)
    with pytest.raises(DataError, match="cannot write"):
        RunLog(run)
    (run / "metrics.jsonl").unlink()
    with RunLog(run) as log:
        log.metrics(1, {"loss/total": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert len(list(run.glob("events.*"))) == 2
