"""The benchmark of training steps: its baselines, its checks, time and memory, and its output."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import end_to_end
import pytest
import torch
from roofline import Machine, configured
from step_bench import correctness, machine_rates, measure, providers, results
from step_bench.providers import PROVIDERS, Baseline, Fastnst, Task, make_task
from torch import Tensor, nn

from fastnst.config import Config
from fastnst.training.step import graphed_step
from helpers.fake_cuda_graph import CpuStreams

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--preset", "johnson", "--image-size", "16", "--steps", "2", "--tflops", "0.1"]
TINY += ["--tb-per-s", "0.01", "--set", 'loss.content_layers=["relu1_2"]']
TINY += ["--set", 'loss.style_layers=["relu1_2","relu2_2"]', "--set", "loss.style_layer_weights=[]"]


def task_of(preset: str, size: int, batch_size: int = 1) -> tuple[Task, Tensor]:
    config: Config = configured(preset, size, batch_size)
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp32", "device": "cpu"})})
    generator = torch.Generator().manual_seed(3)
    batch = torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8, generator=generator)
    return make_task(config, CPU), batch


# Two images: for one, PyTorch 2.13 on a CPU computes wrong gradients of a cropped transposed convolution in
# channels_last.
@pytest.mark.campaign
@pytest.mark.parametrize(
    ("preset", "size"), [("lengstrom", 16), ("johnson", 16), ("vgg-conv3", 16), ("hwalsuklee", 44)]
)
def test_baseline_and_fastnst_agree_with_float64(preset: str, size: int) -> None:
    task, batch = task_of(preset, size, 2)
    exact = Baseline(task, "fp64", channels_last=False)
    reference = correctness.Reference(
        exact(batch).double(), {n: p.grad.double() for n, p in exact.parameters().items()}
    )
    baselines = (Baseline(task, "fp32", channels_last=channels_last) for channels_last in (False, True))
    for provider in (*baselines, Fastnst(task)):
        errors = correctness.check(provider, task, reference, batch, first=True)
        assert errors["loss_error"] < 1e-5
        assert errors["gradient_error"] < 5e-3


def test_baseline_does_no_needless_work() -> None:
    baseline = Baseline(task_of("hwalsuklee", 44)[0], "fp32", channels_last=True)
    assert not any(p.requires_grad for p in baseline._loss.vgg.parameters())
    assert all(m.inplace for m in baseline._loss.modules() if isinstance(m, nn.ReLU))
    for name, module in baseline.net.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            assert module.bias is None, f"{name}: the norm cancels a bias"
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert baseline.optimizer.defaults["fused"]


class Louder(Baseline):
    """Its loss and gradients are a tenth too large."""

    def _loss_of(self, batch: Tensor) -> Tensor:
        return 1.1 * super()._loss_of(batch)


class Lazy(Baseline):
    """It never updates."""

    def __call__(self, batch: Tensor) -> Tensor:
        loss = self._loss_of(batch)
        loss.backward()
        return loss.detach()


class Forgetful(Baseline):
    """Right at first; after its warm-up the gradients are wrong."""

    def __call__(self, batch: Tensor) -> Tensor:
        loss = super().__call__(batch)
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps > 2:
            for parameter in self.net.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(1.1)
        return loss


class Broken(Baseline):
    """It fails."""

    def __call__(self, batch: Tensor) -> Tensor:  # noqa: ARG002
        raise RuntimeError("out of order\nand more")


WRONG = {
    "louder": (Louder, "WrongResult: the loss errs by 0.1 of its size, allowed in fp32 0.0001"),
    "forgetful": (Forgetful, "WrongResult: the gradient errs by 0.1 of its size, allowed in fp32 0.01"),
    "lazy": (Lazy, "WrongResult: Adam's first step moves a weight by 0, not by the learning rate 0.001"),
    "broken": (Broken, "RuntimeError: out of order\n"),
}


def test_end_to_end_refuses_wrong_providers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (kind, _) in WRONG.items():
        monkeypatch.setitem(PROVIDERS, name, lambda task, kind=kind: kind(task, "fp32", channels_last=False))
    file = tmp_path / "rows.json"
    arguments = ["--batch-size", "1", "--providers", ",".join([*WRONG, "eager_fp32"]), "--json", str(file)]
    assert end_to_end.main([*TINY, *arguments]) == 1
    messages = capsys.readouterr().err
    for name, (_, message) in WRONG.items():
        assert f"{name}, batch 1: refused: {message}" in messages
    assert [row["provider"] for row in json.loads(file.read_text("utf-8"))] == ["eager_fp32"]


# A whole run.


@pytest.fixture(scope="module")
def written(generated_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """Rows and page of a run of fastnst, with and without its loader, captured as a CUDA graph, and a baseline."""
    out = tmp_path_factory.mktemp("rows")
    arguments = ["--batch-size", "1,2", "--providers", "fastnst,eager_fp32"]
    arguments += [
        "--busy",
        "1",
        "--folder",
        str(generated_photos),
        "--set",
        "data.loader=pillow",
        "--set",
        "data.workers=1",
    ]
    arguments += ["--set", "data.prefetch=1", "--json", str(out / "rows.json"), "--markdown", str(out / "rows.md")]
    streams: list[CpuStreams] = []

    def open_streams(_: torch.device) -> CpuStreams:
        streams.append(CpuStreams())
        return streams[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphed_step, "CudaStreams", open_streams)
        patch.setattr(graphed_step, "wants_capture", lambda *_: True)
        assert end_to_end.main([*TINY, *arguments]) == 0
    assert streams
    assert all(sum(graph.replays for graph in each.graphs) > 0 for each in streams)
    text = (out / "rows.json").read_text("utf-8")
    assert str(generated_photos) not in text
    return json.loads(text), (out / "rows.md").read_text("utf-8")


def test_end_to_end_rows_have_figures_and_conditions(written: tuple[list[dict[str, Any]], str]) -> None:
    rows, _ = written
    names = ("fastnst", "eager_fp32", "fastnst_fed")
    assert [(row["provider"], row["batch_size"]) for row in rows] == [(name, n) for n in (1, 2) for name in names]
    assert [row.get("captured") for row in rows] == [True, None, True] * 2
    for row in rows:
        assert row["images_per_second"] == pytest.approx(1000 * row["batch_size"] / row["ms_per_step"])
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["roofline_percent"] == pytest.approx(100 * row["bound_ms"] / row["ms_per_step"])
        assert (row["preset"], row["image_size"], row["steps"]) == ("johnson", 16, 2)
        assert (row["tflops"], row["tb_per_s"]) == (0.1, 0.01)
        assert (row["precision"], row["busy"]) == ("fp32", 1)
        assert {"device", "torch", "threads", "python", "revision", "date"} <= set(row["environment"])
        if row["provider"] == "fastnst_fed":
            assert (row["loader"], row["images"], row["peak_memory_bytes"]) == ("pillow", 12, None)
            assert 0 <= row["waiting_share"] <= 1
        else:
            assert row["p50_ms"] == row["ms_per_step"]
            assert row["peak_memory_bytes"] > 0
    assert rows[0]["engine"]
    peaks = {(row["provider"], row["batch_size"]): row["peak_memory_bytes"] for row in rows}
    # Gradients do not grow with the batch, activations do.
    assert 1 < peaks["eager_fp32", 2] / peaks["eager_fp32", 1] <= 2.1


def test_end_to_end_compares_fastnst_with_the_fastest_eager_baseline(written: tuple[list[dict[str, Any]], str]) -> None:
    rows, page = written
    for own in (row for row in rows if row["provider"] == "fastnst"):
        eager = [r for r in rows if r["batch_size"] == own["batch_size"] and r["provider"].startswith("eager")]
        best = max(eager, key=lambda row: row["images_per_second"])
        assert own["best_eager"] == best["provider"]
        ratio = own["images_per_second"] / best["images_per_second"]
        assert own["speed_over_best_eager"] == pytest.approx(ratio)
        assert own["memory_over_best_eager"] == own["peak_memory_bytes"] / best["peak_memory_bytes"]
        assert f"{ratio:.2f}× {best['provider']}" in page
    for row in rows:
        assert f"| {row['provider']} | {row['precision']} | {row['batch_size']} | {row['busy']} | " in page
    assert "Nothing was measured" in results.page([])
    assert results.table([]) == "nothing was measured\n"


@pytest.mark.campaign
def test_compiled_and_mixed_steps_agree(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--batch-size", "1", "--providers", "compile,eager_amp", "--json", str(file)]
    assert end_to_end.main([*TINY, *arguments]) == 0
    compiled, mixed = json.loads(file.read_text("utf-8"))
    assert (compiled["provider"], compiled["torch.compile"]) == ("compile", "default")
    assert (mixed["provider"], mixed["precision"]) == ("eager_amp", "bf16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--providers", "fastnst,egaer"], "--providers: 'egaer' is unknown; known: fastnst, eager_fp32"),
        (["--batch-size", "4,none"], "--batch-size: '4,none'; expected positive numbers such as 4,16,32"),
        (["--set", "model.norm=batch"], "model.norm is 'batch'; the baselines have instance norm only"),
        (["--preset", "lengstrom", "--image-size", "18"], "data.image_size is 18; the plain lengstrom net takes"),
        (["--preset", "hwalsuklee", "--image-size", "40"], "data.image_size is 40; hwalsuklee reflects 40 pixels"),
        (["--set", "train.nothing=1"], "unknown key 'train.nothing'"),
        (["--set", 'loss.style_layers=["conv1_1"]'], "cannot show conv1_1; choose ReLUs"),
    ],
)
def test_end_to_end_refuses_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert end_to_end.main([*TINY, *arguments]) == 2
    assert message in capsys.readouterr().err


# Time and memory.


def test_time_steps_takes_turns() -> None:
    calls: list[tuple[str, int]] = []

    def provider(name: str) -> Any:
        return lambda batch: calls.append((name, int(batch)))

    seconds = measure.time_steps({name: provider(name) for name in "abc"}, [torch.zeros(1), torch.ones(1)], 3, CPU)
    assert [name for name, _ in calls] == list("abcbcacab")
    assert [batch for _, batch in calls] == [1, 1, 1, 0, 0, 0, 1, 1, 1]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_statistics_of_known_times() -> None:
    found = measure.statistics([0.1, 0.1, 0.104, 0.2, 0.1], batch_size=4)
    assert found["images_per_second"] == pytest.approx(40)
    assert found["ms_per_step"] == found["p50_ms"] == pytest.approx(100)
    assert found["p80_ms"] == pytest.approx(123.2)
    assert found["mean_ms"] == pytest.approx(120.8)
    assert found["within_5_percent"] == 0.8


class Toy:
    """A weight of 4 MB with its gradient, a buffer of 2 MB, and a peak of 12 MB in a step."""

    precision = "fp32"

    def __init__(self) -> None:
        self.net = nn.Linear(1000, 1000, bias=False)
        self.net.weight.grad = torch.ones(1000, 1000)
        self.buffer = torch.zeros(500_000)
        self.notes: dict[str, Any] = {}

    def __call__(self, batch: Tensor) -> Tensor:  # noqa: ARG002
        a = torch.empty(1_000_000)
        b = torch.empty(2_000_000)
        del a
        c = torch.empty(500_000)
        return b[0] + c[0]

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": self.net.weight}

    def persistent_tensors(self) -> Iterator[Tensor]:
        yield self.net.weight


def test_peak_beyond_weights_counts_allocations_and_buffers() -> None:
    before = measure.MemoryUse.now(CPU)
    peak = measure.peak_beyond_weights(Toy(), torch.zeros(1, dtype=torch.uint8), before)
    assert 14_000_000 <= peak < 14_001_000


def test_measured_machine_measures_only_missing_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_rates, "_REPEATS", 1)
    measured = machine_rates.measured_machine(CPU)
    assert measured.tflops > 0
    assert measured.tb_per_s > 0
    monkeypatch.setattr(machine_rates, "_best", None)
    assert machine_rates.measured_machine(CPU, 790.0, 4.3) == Machine(790.0, 4.3)


def test_precision_of_amp_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = task_of("johnson", 16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert providers._amp(task) == "bf16"
    assert providers._amp(Task(task.config, torch.device("cuda"), {}, {}, task.style)) == "fp16"
