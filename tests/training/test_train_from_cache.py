"""Training from a cache: the same weights as from its folder, exact resume, and the messages of the command line."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastnst.data.cache import format
from fastnst.data.cache.build import build_cache
from fastnst.data.loaders import open_loader
from fastnst.data.manifest import build_manifest
from fastnst.errors import UserError
from fastnst.training.style_run import StyleRun
from helpers.run_comparison import assert_same_weights
from helpers.tiny_runs import logged, make_small, newest, small_arguments, small_config, train_small

Fastnst = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks, small shards, but real loaders."""
    make_small(monkeypatch)
    monkeypatch.setattr("fastnst.training.trainer.open_loader", open_loader)
    monkeypatch.setattr(format, "SHARD_BYTES", 10_000)


@pytest.fixture
def cache(few_photos: Path, tmp_path: Path) -> Path:
    """A cache of 16 px, the image size of `small_config`."""
    return build_cache(
        build_manifest(few_photos, allow_uniform=False), tmp_path / "cache", size=16, fit="random_crop"
    ).cache.folder


def train_on(folder: Path, out: Path, photos: Path, *assignments: str, **options: Any) -> list[str]:
    config = small_config(photos, *assignments)
    data = config.data.model_copy(update={"folder": folder})
    return train_small(config.model_copy(update={"data": data}), out, **options)


def test_train_from_cache_and_folder_gives_the_same_weights(cache: Path, few_photos: Path, tmp_path: Path) -> None:
    messages = train_on(cache, tmp_path / "from_cache", few_photos, "data.loader=dali", "train.samples=2")
    assert any("5 in the folder, 16 px, fp32 on" in text and "loader cache" in text for text in messages)
    train_on(few_photos, tmp_path / "from_folder", few_photos, "train.samples=2")
    assert_same_weights(tmp_path / "from_cache", tmp_path / "from_folder")
    assert logged(tmp_path / "from_cache") == logged(tmp_path / "from_folder")


def test_train_resume_from_cache_is_exact(cache: Path, few_photos: Path, tmp_path: Path) -> None:
    train_on(cache, tmp_path / "whole", few_photos)
    train_on(cache, tmp_path / "parts", few_photos, "train.steps=3")
    messages = train_on(cache, tmp_path / "parts", few_photos, resume=True)
    assert any("resuming at step 3" in text for text in messages)
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


def test_train_resume_from_folder_to_its_cache_needs_allow_changes(
    cache: Path, few_photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_on(few_photos, run, few_photos, "train.steps=3")
    with pytest.raises(UserError, match=r"data.folder was .*, is now .*cache"):
        train_on(cache, run, few_photos, resume=True)
    messages = train_on(cache, run, few_photos, resume=True, allow_changes=True)
    assert any("goes on, though data.folder was" in text for text in messages)
    assert any("goes on, though the images in the data folder changed" in text for text in messages)
    train_on(few_photos, tmp_path / "whole", few_photos)
    assert_same_weights(run, tmp_path / "whole")


def test_train_stops_at_a_truncated_shard_and_resumes_after_rebuild(
    cache: Path, few_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fastnst: Fastnst
) -> None:
    run = tmp_path / "run"
    whole = (cache / "shard_0000.u8").read_bytes()
    save = StyleRun._save

    def save_then_cut(self: Any, log: Any, step: int) -> None:
        save(self, log, step)
        if step == 2:
            os.truncate(cache / "shard_0000.u8", 5)

    monkeypatch.setattr(StyleRun, "_save", save_then_cut)
    arguments = small_arguments(few_photos, run, "train.steps=40", "data.prefetch=1")
    arguments[arguments.index("--data") + 1] = str(cache)
    code, _, err = fastnst(*arguments)
    assert code == 3
    assert "shard_0000.u8 was written to: it has 5 bytes, and had" in err
    assert "--rebuild, then go on with --resume" in err
    assert "Traceback" not in err
    assert newest(run).step >= 2
    monkeypatch.setattr(StyleRun, "_save", save)
    code, _, err = fastnst(*arguments, "--resume")
    assert code == 3
    assert "shard_0000.u8 is damaged: it has 5 bytes" in err
    assert (
        fastnst("data", "cache", few_photos, "--size", 16, "--fit", "random_crop", "--out", cache, "--rebuild")[0] == 0
    )
    assert (cache / "shard_0000.u8").read_bytes() == whole
    assert fastnst(*arguments, "--resume")[0] == 0
    train_on(cache, tmp_path / "whole", few_photos, "train.steps=40", "data.prefetch=1")
    assert_same_weights(run, tmp_path / "whole")


def test_data_cache_and_check_commands(
    photo_folder: Path, tmp_path: Path, fastnst: Fastnst, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (photo_folder / "broken.png").write_bytes(b"no image")
    code, out, err = fastnst("data", "cache", photo_folder, "--preset", "vgg-conv3", "--size", 32)
    assert (code, out) == (0, "caches/photos-32\n")
    assert "12 images of 32 px (random_crop), 1 refused" in err
    command = "fastnst train --data caches/photos-32 --preset vgg-conv3 --set data.image_size=32 --style IMAGE"
    assert f"train with: {command}" in err
    cache = tmp_path / "caches" / "photos-32"

    code, out, _ = fastnst("data", "cache", photo_folder, "--preset", "vgg-conv3", "--size", 32, "--json")
    report = json.loads(out)
    assert (code, report["pictures"], report["size"], report["fit"]) == (0, 12, 32, "random_crop")
    assert report["shards"] == report["shards_kept"] > 1
    assert report["rejected"][0]["path"] == "broken.png"
    assert report["bytes"] == sum(path.stat().st_size for path in cache.glob("*.u8"))

    code, out, _ = fastnst("data", "check", cache)
    assert code == 0
    assert out.startswith("12 images of 32 px (random_crop)")
    (cache / "shard_0001.u8").unlink()
    code, out, err = fastnst("data", "check", cache, "--json")
    assert code == 3
    assert json.loads(out)["damaged"] == [f"{cache}/shard_0001.u8 is missing"]
    assert "--rebuild" in err
    code, _, err = fastnst("data", "cache", photo_folder, "--size", 32, "--fit", "random_crop")
    assert code == 3
    assert "shard_0001.u8 is missing; rebuild what is damaged with: " in err

    code, _, err = fastnst("data", "cache", cache)
    assert code == 3
    assert "is a cache already; give the folder" in err
    code, _, err = fastnst("data", "cache", photo_folder, "--size", 8)
    assert code == 2
    code, _, err = fastnst(*small_arguments(photo_folder, tmp_path / "run"), "--data", cache, "--dry-run")
    assert code == 3
    assert "data.image_size is 16, and " in err
    assert "was made for 32; make a matching one with: fastnst data cache" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "size", "fit"),
    [
        ((), 256, "squash"),
        (("--preset", "johnson"), 256, "center_crop"),
        (("--preset", "vgg-conv3"), 256, "random_crop"),
        (("--size", 32), 32, "squash"),
        (("--fit", "random_crop", "--size", 16), 16, "random_crop"),
        (("--preset", "lengstrom", "--fit", "center_crop"), 256, "center_crop"),
    ],
)
def test_data_cache_closes_with_a_command_that_trains(
    photo_folder: Path,
    tmp_path: Path,
    fastnst: Fastnst,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[object, ...],
    size: int,
    fit: str,
) -> None:
    monkeypatch.setattr(format, "SHARD_BYTES", 1 << 30)
    out = tmp_path / "my cache #1"
    code, _, err = fastnst("data", "cache", photo_folder, *options, "--out", out)
    assert code == 0, err
    assert f"12 images of {size} px ({fit})" in err
    command = shlex.split(err.strip().rpartition("train with: ")[2].replace("IMAGE", f"{photo_folder}/image_00.jpg"))
    assert command[:2] == ["fastnst", "train"]
    plan = ("--vgg", "random", "--device", "cpu", "--out", tmp_path / "run", "--dry-run")
    code, printed, err = fastnst(*command[1:], *plan)
    assert code == 0, err
    assert f"image_size = {size}" in printed
    assert f'fit = "{fit}"' in printed


def test_data_cache_names_another_size_or_fit_before_it_decodes(
    photo_folder: Path, tmp_path: Path, fastnst: Fastnst, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cache"
    assert fastnst("data", "cache", photo_folder, "--size", 16, "--out", out)[0] == 0
    monkeypatch.setattr("fastnst.data.manifest.build_manifest", lambda *_, **__: pytest.fail("images were decoded"))
    code, _, err = fastnst("data", "cache", photo_folder, "--size", 32, "--out", out)
    assert code == 3
    replaced = shlex.join(["fastnst", "data", "cache", str(photo_folder), "--size", "32", "--fit", "squash"])
    assert f"{out} is a cache of 16 px, squash, and 32 px, squash are wanted; replace it with: {replaced}" in err
    style = ("--style", photo_folder / "image_00.jpg", "--data", out, "--vgg", "random", "--out", tmp_path / "run")
    monkeypatch.setattr("fastnst.training.inputs.load_vgg19", lambda *_, **__: pytest.fail("VGG19 was loaded"))
    code, _, err = fastnst("train", *style)
    assert code == 3
    assert "data.image_size is 256, and " in err
    assert "--size 256 --fit squash --out" in err
    assert "or train with --set data.image_size=16 --set data.fit=squash" in err
