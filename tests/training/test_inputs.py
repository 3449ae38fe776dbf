"""What a run reads before its directory is touched."""

from pathlib import Path

import pytest
from PIL import Image

from fastnst.config import DataConfig, load_config
from fastnst.errors import UserError
from fastnst.training.inputs import read_manifest, total_steps
from fastnst.training.train import train
from helpers.tiny_runs import small_config


def test_read_manifest_refuses_an_image_of_one_colour(photo_folder: Path) -> None:
    Image.new("RGB", (64, 48), "teal").save(photo_folder / "flat.png")
    manifest = read_manifest(DataConfig(folder=photo_folder))
    assert len(manifest.images) == 12
    (refused,) = manifest.rejected
    assert refused.path == "flat.png"
    assert "one colour" in refused.reason


def test_train_refuses_fewer_images_than_one_batch(generated_photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.batch_size is 13, and .* holds 12 usable images") as refused:
        train(small_config(generated_photos, "train.batch_size=13"), tmp_path / "run")
    assert str(refused.value).endswith("add some, or use --set train.batch_size=12 or less")
    assert not (tmp_path / "run").exists()


def test_total_steps_follow_from_epochs() -> None:
    config = load_config(assignments=["train.epochs=2", "train.batch_size=4"], environment={}).train
    assert total_steps(config, 118_287) == 59_144
    assert total_steps(config, 1) == 1
    assert total_steps(config.model_copy(update={"steps": 7}), 118_287) == 7
