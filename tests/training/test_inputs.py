"""What a run reads before it begins: images, steps, and the names of several styles."""

from pathlib import Path

import pytest
from PIL import Image

from fastnst.config import DataConfig, load_config
from fastnst.errors import DataError, UserError
from fastnst.training.inputs import read_manifest, total_steps
from fastnst.training.run_dir.style_folder import STYLES_NAME, saved_styles, style_names
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


def test_style_names_are_stems_and_differ() -> None:
    assert style_names([Path("a/wave.jpg"), Path("b/scream.png")]) == {
        "wave": Path("a/wave.jpg"),
        "scream": Path("b/scream.png"),
    }
    with pytest.raises(UserError, match=r"b/wave\.png would have the same run directory as a/wave\.jpg: 'wave'"):
        style_names([Path("a/wave.jpg"), Path("b/wave.png")])
    with pytest.raises(UserError, match=r"the same run directory as itself: 'wave'; give each style once"):
        style_names([Path("a/wave.jpg"), Path("a/wave.jpg")])


@pytest.mark.parametrize(
    "content",
    [
        *(b"[]", b"{}", b'{"a": 1}', b'{"..": "/x.jpg"}', b'{"a/b": "/x.jpg"}', b'{".": "/x.jpg"}', b"\xff"),
        *(b"[" * 100_000, b'{"a": "' + b"x" * (1 << 22) + b'"}'),
    ],
    ids=range(9),
)
def test_saved_styles_refuses_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STYLES_NAME).write_bytes(content)
    with pytest.raises(DataError, match=r"styles\.json is damaged; go on with each style by fastnst train --resume"):
        saved_styles(tmp_path)
