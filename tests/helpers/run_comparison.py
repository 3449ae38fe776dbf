"""What a run has left, in a form that two runs can be compared in to the last bit."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def assert_same_outcome(run: Path, reference: Path) -> None:
    """Weights, optimiser, random states, style model, metrics and TensorBoard log are equal; nothing else is left."""
    assert leftovers(run) == []
    assert files_of(run) == files_of(reference)
    for name in files_of(reference):
        if name.startswith("checkpoints/"):
            assert (run / name).read_bytes() == (reference / name).read_bytes(), name
    assert _split(run / "model.safetensors") == _split(reference / "model.safetensors")
    assert metrics_of(run) == metrics_of(reference)
    events, expected = events_of(run), events_of(reference)
    assert events.keys() == expected.keys()
    for tag, values in expected.items():
        assert events[tag] == values, tag


def assert_same_weights(run: Path, reference: Path) -> None:
    """The style models have equal bits."""
    weights, others = (load_file(folder / "model.safetensors") for folder in (run, reference))
    torch.testing.assert_close(weights, others, rtol=0, atol=0)


def _split(safetensors: Path) -> tuple[Any, bytes]:
    """Header, whose metadata the library writes in any order, and all that follows."""
    data = safetensors.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` without speeds."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{tag: value for tag, value in row.items() if not tag.startswith("speed/")} for row in rows]


def events_of(run: Path) -> dict[str, list[tuple[int, Any]]]:
    """What TensorBoard shows of a run, without speeds: by tag, step and value of each scalar, histogram and image."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    log.Reload()
    tags = log.Tags()
    shown = {tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in tags["scalars"] if "speed/" not in tag}
    shown |= {tag: [(e.step, e.histogram_value) for e in log.Histograms(tag)] for tag in tags["histograms"]}
    return shown | {tag: [(e.step, e.encoded_image_string) for e in log.Images(tag)] for tag in tags["images"]}


def leftovers(run: Path) -> list[str]:
    """Temporary files and folders, relative to the run directory."""
    return sorted(str(path.relative_to(run)) for path in run.rglob("*.part"))


def files_of(run: Path) -> list[str]:
    """All files but the event files, whose names hold times."""
    found = (path for path in run.rglob("*") if path.is_file() and not path.name.startswith("events.out"))
    return sorted(str(path.relative_to(run)) for path in found)
