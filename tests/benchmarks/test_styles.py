"""The benchmark of several styles: what it measures, and that it refuses to compare what differs."""

import json
from pathlib import Path

import pytest
import styles
import torch

from fastnst.training.step.train_step import ContentFeatures, NetTrainer

TINY = ["--device", "cpu", "--preset", "johnson", "--image-size", "16", "--steps", "2", "--turns", "1"]
TINY += ["--set", 'loss.content_layers=["relu1_2"]', "--set", 'loss.style_layers=["relu1_2","relu2_2"]']
TINY += ["--set", "loss.style_layer_weights=[]", "--set", "data.loader=pillow", "--set", "data.workers=1"]
TINY += ["--set", "data.prefetch=1"]


def test_both_kinds_train_the_same(few_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_kinds_that_train_otherwise_are_refused(
    few_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content_features = NetTrainer.content_features

    def wrong(self: NetTrainer, batch: torch.Tensor) -> ContentFeatures | None:
        content = content_features(self, batch)
        assert content is not None
        return ContentFeatures(content.images, {name: 1.01 * target for name, target in content.targets.items()})

    monkeypatch.setattr(styles._Bench, "_segment", _with_wrong_sharing(wrong))
    file = tmp_path / "styles.json"
    assert styles.main([*TINY, "--folder", str(few_photos), "--styles", "2", "--json", str(file)]) == 1
    assert not file.exists()
    assert "the weights of both kinds differ" in capsys.readouterr().err


def _with_wrong_sharing(wrong: object) -> object:
    original = styles._Bench._segment

    def segment(self: styles._Bench, turn: int, group: list[NetTrainer]) -> float:
        if len(group) == 1:
            return original(self, turn, group)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(NetTrainer, "content_features", wrong)
            return original(self, turn, group)

    return segment


def test_what_it_cannot_measure(few_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert styles.main([*TINY, "--folder", str(tmp_path / "none")]) == 3
    assert styles.main([*TINY, "--folder", str(few_photos), "--styles", "0"]) == 2
    assert "--styles, --steps and --turns are at least 1" in capsys.readouterr().err
