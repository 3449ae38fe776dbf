"""The benchmark of trainings at the same time."""

import json
from pathlib import Path

import numpy as np
import pytest
import two_trainings
from PIL import Image


@pytest.mark.slow
def test_two_trainings_measures_one_alone_and_two_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, file = tmp_path / "photos", tmp_path / "rows.json"
    photos.mkdir()
    ramp = np.linspace(0, 255, 40 * 40 * 3).reshape(40, 40, 3).astype(np.uint8)
    for index in range(4):
        Image.fromarray(np.roll(ramp, 7 * index, axis=1)).save(photos / f"{index}.png")
    options = [
        "--preset",
        "johnson",
        "--loader",
        "pillow",
        "--set",
        "data.image_size=32",
        "--set",
        "train.batch_size=2",
    ]
    arguments = [str(photos), str(photos / "0.png"), "--steps", "3", "--turns", "1", "--json", str(file)]
    assert two_trainings.main([*arguments, "--", *options]) == 0
    result = json.loads(file.read_text("utf-8"))
    assert len(result["images_per_second_alone"]) == len(result["images_per_second_together"]) == 1
    ratio = result["images_per_second_together"][0] / result["images_per_second_alone"][0]
    assert result["together_over_alone"] == pytest.approx(ratio)
    assert f"{ratio:.2f}×" in capsys.readouterr().out
    assert two_trainings.main([*arguments, "--", "--preset", "none"]) == 3
    assert "a training ended with 2: " in capsys.readouterr().err


def test_rate_leaves_the_first_step_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"speed/images_per_second": {rate}}}\n' for rate in (0.1, 2, 6)))
    assert two_trainings._rate(file) == pytest.approx(3.0)
