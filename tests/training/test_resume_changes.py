"""`train --resume` with changes: named with both values, and refused, or with `--allow-changes` logged."""

import codecs
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from fastnst.config import load_config
from fastnst.data.manifest import build_manifest
from fastnst.data.replacements import ReadFailure, append_row, failure_row, read_failures
from fastnst.errors import DataError, UserError
from fastnst.training.run_dir.checkpoint import save_checkpoint
from fastnst.training.run_dir.layout import saved_config
from fastnst.training.run_dir.style_folder import saved_styles
from helpers.tiny_runs import Killed, make_small, newest, small_arguments, small_config, train_small


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture
def run(photo_folder: Path, tmp_path: Path) -> Path:
    """A run of five steps."""
    train_small(small_config(photo_folder), tmp_path / "run")
    return tmp_path / "run"


def snapshot(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def resume(config_photos: Path, run: Path, *assignments: str, allow_changes: bool = False) -> list[str]:
    config = small_config(config_photos, "train.steps=7", *assignments)
    return train_small(config, run, resume=True, allow_changes=allow_changes)


def remove_an_image(photos: Path, _: Path) -> None:
    (photos / "image_03.jpg").unlink()


def exchange_the_style(photos: Path, _: Path) -> None:
    # It lies among the photos, which so change as well.
    style = photos / "image_00.jpg"
    style.write_bytes(style.read_bytes() + b"\0")


def exchange_vgg(_: Path, run: Path) -> None:
    alter(run, fingerprints=newest(run).state["fingerprints"] | {"vgg": "0" * 64})


def another_world_size(_: Path, run: Path) -> None:
    alter(run, world_size=2)


def alter(run: Path, **state: object) -> None:
    """As if the newest checkpoint had been written with another state."""
    checkpoint = newest(run)
    save_checkpoint(run, checkpoint.step, tensors=checkpoint.tensors, state=checkpoint.state | state, keep=3)


CHANGES = [
    (remove_an_image, DataError, r"images in the data folder changed .*\(12 images, SHA-256 \w+… then, 11 images"),
    (exchange_the_style, DataError, r"the style image changed .*\(SHA-256 \w{12}… then, \w{12}… now\)"),
    (exchange_vgg, DataError, r"the VGG19 weights changed .*\(SHA-256 0{12}… then, \w{12}… now\)"),
    (another_world_size, UserError, "the processes that share a step were 2, are now 1"),
]


@pytest.mark.parametrize(("change", "error", "text"), CHANGES, ids=[change.__name__ for change, _, _ in CHANGES])
def test_train_resume_names_refuses_and_allows_changes(
    photo_folder: Path, run: Path, change: Callable[[Path, Path], None], error: type[UserError], text: str
) -> None:
    change(photo_folder, run)
    before = snapshot(run)
    with pytest.raises(error, match=f"{text}.*--allow-changes") as caught:
        resume(photo_folder, run)
    assert type(caught.value) is error
    assert snapshot(run) == before
    listed = [message for message in resume(photo_folder, run, allow_changes=True) if message.startswith("goes on")]
    assert any(re.search(text, message) for message in listed)
    assert newest(run).step == 7
    # What was allowed once is the run's own from then on.
    assert not [message for message in resume(photo_folder, run) if "goes on" in message]


def test_train_resume_lists_a_changed_configuration_key_by_key(photo_folder: Path, run: Path) -> None:
    changes = ("train.learning_rate=0.01", "train.batch_size=3", "train.precision=fp16", "data.flip=false")
    texts = [
        *("train.learning_rate was 0.003, is now 0.01", "train.batch_size was 2, is now 3"),
        *('train.precision was "fp32", is now "fp16"', "data.flip was true, is now false"),
    ]
    before = snapshot(run)
    with pytest.raises(UserError, match="begun with another configuration") as caught:
        resume(photo_folder, run, *changes)
    assert caught.value.exit_code == 2
    assert all(text in str(caught.value) for text in (*texts, "--allow-changes"))
    assert snapshot(run) == before
    messages = resume(photo_folder, run, *changes, allow_changes=True)
    assert sorted(message for message in messages if message.startswith("goes on")) == sorted(
        f"goes on, though {text}" for text in texts
    )
    assert any("the order of the images is from now on" in message for message in messages)
    saved = load_config(file=run / "config.toml", environment={})
    assert (saved.train.learning_rate, saved.train.batch_size, saved.data.flip) == (0.01, 3, False)
    assert newest(run).state["scaler"]["scale"] == 65536.0  # there was none before; it begins as in a new run
    assert "goes on" not in "\n".join(resume(photo_folder, run, *changes))
    with pytest.raises(UserError, match=r"train\.learning_rate was 0\.01, is now 0\.003"):
        resume(photo_folder, run)


def test_train_resume_finds_moved_images_and_style(photo_folder: Path, run: Path, tmp_path: Path) -> None:
    moved = photo_folder.rename(tmp_path / "moved")
    messages = resume(moved, run.rename(tmp_path / "renamed"))
    notes = [message for message in messages if message.startswith("goes on")]
    assert notes == [
        f'goes on: data.folder was "{photo_folder}", is now "{moved}", with the same content',
        f'goes on: style.image was "{photo_folder}/image_00.jpg", is now "{moved}/image_00.jpg", with the same content',
    ]
    assert newest(tmp_path / "renamed").step == 7
    assert not [message for message in resume(moved, tmp_path / "renamed") if "goes on" in message]


def test_train_resume_refuses_moved_images_that_changed(photo_folder: Path, run: Path, tmp_path: Path) -> None:
    moved = photo_folder.rename(tmp_path / "moved")
    (moved / "image_03.jpg").unlink()
    before = snapshot(run)
    text = f'data.folder was "{photo_folder}", is now "{moved}"; the images .*12 images, SHA-256 .* 11 images'
    with pytest.raises(DataError, match=text) as caught:
        resume(moved, run)
    assert "the style image" not in str(caught.value)
    assert snapshot(run) == before


def test_train_resume_compares_the_weights_and_not_where_they_lie(photo_folder: Path, run: Path) -> None:
    state = newest(run).state
    alter(run, configuration=state["configuration"] | {"loss.vgg": '"/old/vgg19.pth"'})
    (note,) = [message for message in resume(photo_folder, run) if message.startswith("goes on")]
    assert note == 'goes on: loss.vgg was "/old/vgg19.pth", is now "random", with the same content'


def test_train_resume_without_a_checkpoint_notes_other_paths(photo_folder: Path, run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    messages = resume(photo_folder.rename(tmp_path / "moved"), run)
    assert len([text for text in messages if text.endswith("no checkpoint was made from the old")]) == 2
    assert any("starting at step 0" in message for message in messages)


def test_files_of_a_run_may_have_been_saved_with_a_byte_order_mark(
    photo_folder: Path, run: Path, tmp_path: Path
) -> None:
    entry = build_manifest(photo_folder).images[3]
    append_row(run / "rejected.jsonl", failure_row(ReadFailure(entry, "unreadable", 2)))
    (tmp_path / "styles.json").write_bytes(codecs.BOM_UTF8 + b'{"wave": "wave.jpg"}')
    for name in ("config.toml", "rejected.jsonl"):
        (run / name).write_bytes(codecs.BOM_UTF8 + (run / name).read_bytes())
    assert saved_styles(tmp_path) == {"wave": Path("wave.jpg")}
    assert [failure.entry.path for failure in read_failures(run / "rejected.jsonl")] == [entry.path]
    assert saved_config(run).data.folder == photo_folder
    resume(photo_folder, run)
    assert newest(run).step == 7


def test_train_resume_keeps_what_was_allowed_if_it_is_killed_at_once(photo_folder: Path, run: Path) -> None:
    (photo_folder / "image_03.jpg").unlink()
    with mock.patch("fastnst.training.trainer.RunLog", side_effect=Killed), pytest.raises(Killed):
        resume(photo_folder, run, "train.learning_rate=0.01", allow_changes=True)
    messages = resume(photo_folder, run, "train.learning_rate=0.01")
    assert any(message.startswith("resuming at step 5") for message in messages)


def test_train_resume_finds_a_configuration_file_edited_by_hand(photo_folder: Path, run: Path) -> None:
    file = run / "config.toml"
    file.write_text(file.read_text().replace("learning_rate = 0.003", "learning_rate = 0.01"))
    with pytest.raises(UserError, match=r"was trained otherwise: train.learning_rate was 0.003, is now 0.01"):
        resume(photo_folder, run, "train.learning_rate=0.01")


@pytest.mark.parametrize(
    ("assignment", "text"),
    [
        ("model.architecture=hwalsuklee", 'model.architecture was "johnson", is now "hwalsuklee"'),
        ("model.norm=batch", 'model.norm was "instance", is now "batch"'),
    ],
)
@pytest.mark.parametrize("by_hand", [False, True])
def test_train_resume_never_allows_another_network(
    photo_folder: Path, run: Path, assignment: str, text: str, by_hand: bool
) -> None:
    if by_hand:
        key, _, value = assignment.partition("=")
        old = 'architecture = "johnson"' if "arch" in key else 'norm = "instance"'
        file = run / "config.toml"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, f'{key.partition(".")[2]} = "{value}"'))
    with pytest.raises(DataError, match=f"those of another network: {text}") as caught:
        resume(photo_folder, run, assignment, allow_changes=True)
    assert caught.value.exit_code == 3


def test_train_resume_takes_changeable_keys_without_a_word(photo_folder: Path, run: Path) -> None:
    free = ("train.log_every=3", "train.checkpoint_every=3", "train.keep_checkpoints=1", "data.prefetch=2")
    messages = resume(photo_folder, run, *free)
    assert not [message for message in messages if "goes on" in message]
    assert newest(run).step == 7


def test_train_resume_refuses_a_checkpoint_without_provenance(photo_folder: Path, run: Path) -> None:
    checkpoint = newest(run)
    save_checkpoint(run, 5, tensors=checkpoint.tensors, state={"scaler": {}}, keep=3)
    with pytest.raises(DataError, match="does not say what it was trained with"):
        resume(photo_folder, run, allow_changes=True)


def test_train_resume_lists_changes_without_a_checkpoint(photo_folder: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    messages = resume(photo_folder, run, "train.learning_rate=0.01", allow_changes=True)
    assert "goes on, though train.learning_rate was 0.003, is now 0.01" in messages
    assert any("starting at step 0" in message for message in messages)


def test_train_resume_with_changes_on_the_command_line(
    photo_folder: Path, tmp_path: Path, fastnst: Callable[..., tuple[int, str, str]]
) -> None:
    run = tmp_path / "run"
    assert fastnst(*small_arguments(photo_folder, run))[0] == 0
    again = ("train", "--resume", "--out", str(run), "--set", "train.learning_rate=0.01", "--steps", "6")
    code, _, err = fastnst(*again)
    assert code == 2
    assert "train.learning_rate was 0.003, is now 0.01" in err
    code, out, _ = fastnst(*again, "--allow-changes", "--dry-run")
    assert code == 0
    assert "# changed    train.learning_rate was 0.003, is now 0.01" in out
    code, _, err = fastnst(*again, "--allow-changes")
    assert code == 0, err
    assert "goes on, though train.learning_rate was 0.003, is now 0.01" in err
    code, _, err = fastnst("train", "--resume", "--out", str(run), "--steps", "7")
    assert code == 0, err
    moved = photo_folder.rename(tmp_path / "moved")
    code, out, _ = fastnst(
        "train",
        "--resume",
        "--out",
        str(run),
        "--data",
        str(moved),
        "--style",
        str(moved / "image_00.jpg"),
        "--dry-run",
    )
    assert code == 0
    assert f'# moved      data.folder was "{photo_folder}", is now "{moved}"; the run stops if the content' in out
    assert "# changed" not in out
    moved.rename(photo_folder)
    (photo_folder / "image_05.webp").unlink()
    assert fastnst("train", "--resume", "--out", str(run), "--steps", "8")[0] == 3
    code, _, err = fastnst(*small_arguments(photo_folder, tmp_path / "new"), "--allow-changes")
    assert code == 2
    assert "give --resume with it" in err
