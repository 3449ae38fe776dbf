"""Resuming with something else than before: named with both values, refused, or allowed and listed."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastnst.cli import main as cli
from fastnst.config import load_config
from fastnst.errors import DataError, UserError
from fastnst.training.run_dir.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from helpers.tiny_runs import make_small, small_arguments, small_config, train_small


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture
def run(photo_folder: Path, tmp_path: Path) -> Path:
    """A run of five steps."""
    out = tmp_path / "run"
    train_small(small_config(photo_folder), out)
    return out


def newest(run: Path) -> Checkpoint:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


def snapshot(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def resume(config_photos: Path, run: Path, *assignments: str, allow_changes: bool = False) -> list[str]:
    config = small_config(config_photos, "train.steps=7", *assignments)
    return train_small(config, run, resume=True, allow_changes=allow_changes)


def remove_a_image(photos: Path, _: Path) -> None:
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
    (
        remove_a_image,
        DataError,
        r"images in the data folder changed .*\(12 images, SHA-256 \w+… then, 11 images",
    ),
    (exchange_the_style, DataError, r"the style image changed .*\(SHA-256 \w{12}… then, \w{12}… now\)"),
    (exchange_vgg, DataError, r"the VGG19 weights changed .*\(SHA-256 0{12}… then, \w{12}… now\)"),
    (another_world_size, UserError, "the processes that share a step were 2, are now 1"),
]


@pytest.mark.parametrize(("change", "error", "text"), CHANGES, ids=[change.__name__ for change, _, _ in CHANGES])
def test_what_changed_is_named_refused_and_allowed(
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


def test_another_configuration_is_listed_key_by_key(photo_folder: Path, run: Path) -> None:
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


def test_what_was_allowed_is_kept_even_if_the_process_is_killed_at_once(
    photo_folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (photo_folder / "image_03.jpg").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("fastnst.training.trainer.RunLog", die)
        with pytest.raises(KeyboardInterrupt):
            resume(photo_folder, run, "train.learning_rate=0.01", allow_changes=True)
    messages = resume(photo_folder, run, "train.learning_rate=0.01")
    assert any(message.startswith("resuming at step 5") for message in messages)


def test_a_configuration_file_edited_by_hand_is_another_configuration(photo_folder: Path, run: Path) -> None:
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
def test_another_network_is_never_allowed(
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


def test_what_only_watches_is_free(photo_folder: Path, run: Path) -> None:
    free = ("train.log_every=3", "train.checkpoint_every=3", "train.keep_checkpoints=1", "data.prefetch=2")
    messages = resume(photo_folder, run, *free)
    assert not [message for message in messages if "goes on" in message]
    assert newest(run).step == 7


def test_a_checkpoint_that_does_not_tell_its_origin(photo_folder: Path, run: Path) -> None:
    checkpoint = newest(run)
    save_checkpoint(run, 5, tensors=checkpoint.tensors, state={"scaler": {}}, keep=3)
    with pytest.raises(DataError, match="does not tell what it was trained with"):
        resume(photo_folder, run, allow_changes=True)


def test_a_change_without_a_checkpoint_is_listed_too(photo_folder: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    messages = resume(photo_folder, run, "train.learning_rate=0.01", allow_changes=True)
    assert "goes on, though train.learning_rate was 0.003, is now 0.01" in messages
    assert any("starting at step 0" in message for message in messages)


def test_weights_go_on_from_where_they_were(photo_folder: Path, run: Path) -> None:
    """A learning rate of next to nothing: seven steps end where five did."""
    before = newest(run).tensors
    resume(photo_folder, run, "train.learning_rate=1e-30", allow_changes=True)
    after = newest(run).tensors
    assert float(after["optimizer.step.conv1.weight"]) == 7
    for name in ("model.conv1.weight", "model.conv1.bias"):
        assert torch.equal(after[name], before[name])


# The command line.


def fastnst(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["fastnst", *arguments])
    capsys.readouterr()
    code: object = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    assert isinstance(code, int)
    captured = capsys.readouterr()
    return code, captured.err + captured.out


def test_on_the_command_line(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert fastnst(monkeypatch, capsys, *small_arguments(photo_folder, out))[0] == 0
    again = ("train", "--resume", "--out", str(out), "--set", "train.learning_rate=0.01", "--steps", "6")
    code, said = fastnst(monkeypatch, capsys, *again)
    assert code == 2
    assert "train.learning_rate was 0.003, is now 0.01" in said
    code, said = fastnst(monkeypatch, capsys, *again, "--allow-changes", "--dry-run")
    assert code == 0
    assert "# changed    train.learning_rate was 0.003, is now 0.01" in said
    code, said = fastnst(monkeypatch, capsys, *again, "--allow-changes")
    assert code == 0, said
    assert "goes on, though train.learning_rate was 0.003, is now 0.01" in said
    code, said = fastnst(monkeypatch, capsys, "train", "--resume", "--out", str(out), "--steps", "7")
    assert code == 0, said
    (photo_folder / "image_05.webp").unlink()
    assert fastnst(monkeypatch, capsys, "train", "--resume", "--out", str(out), "--steps", "8")[0] == 3
    code, said = fastnst(monkeypatch, capsys, *small_arguments(photo_folder, tmp_path / "new"), "--allow-changes")
    assert code == 2
    assert "give --resume with it" in said
