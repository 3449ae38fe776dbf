"""The benchmark of several styles: its result, and its refusal to compare different trainings."""

import json
from pathlib import Path

import pytest
import styles
import torch

TINY = ["--device", "cpu", "--preset", "johnson", "--image-size", "16", "--steps", "1", "--turns", "1"]
TINY += ["--set", 'loss.content_layers=["relu1_2"]', "--set", 'loss.style_layers=["relu1_2","relu2_2"]']
TINY += ["--set", "loss.style_layer_weights=[]", "--set", "data.loader=pillow", "--set", "data.workers=1"]
TINY += ["--set", "data.prefetch=1"]


def test_styles_both_modes_train_alike(few_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "styles.json"
    assert styles.main([*TINY, "--folder", str(few_photos), "--styles", "2", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    seconds = result["seconds_per_step_of_all"]
    assert {kind: len(values) for kind, values in seconds.items()} == {"together": 1, "alone": 1}
    assert min(seconds["together"] + seconds["alone"]) > 0
    assert result["together_over_alone"] == pytest.approx(seconds["together"][0] / seconds["alone"][0])
    assert (result["styles"], result["weights_relative_distance"], result["images"]) == (2, 0.0, 5)
    assert result["environment"]["torch"] == torch.__version__
    assert "together / alone = " in capsys.readouterr().out


def test_styles_refuses_modes_with_different_weights(
    few_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_otherwise(self: styles._Bench) -> dict[str, list[float]]:
        with torch.no_grad():
            next(self._together[0].net.parameters()).mul_(1.001)
        return {"together": [1.0], "alone": [1.0]}

    monkeypatch.setattr(styles._Bench, "measure", train_otherwise)
    file = tmp_path / "styles.json"
    assert styles.main([*TINY, "--folder", str(few_photos), "--styles", "1", "--json", str(file)]) == 1
    assert not file.exists()
    assert "the weights of both modes differ" in capsys.readouterr().err


def test_styles_refuses_wrong_options(few_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert styles.main([*TINY, "--folder", str(tmp_path / "none")]) == 3
    assert styles.main([*TINY, "--folder", str(few_photos), "--styles", "0"]) == 2
    assert "--styles, --steps and --turns are at least 1" in capsys.readouterr().err
