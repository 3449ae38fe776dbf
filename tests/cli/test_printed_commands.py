"""Commands in messages: pasted into a shell, each names the path that it is about, whatever that path holds."""

import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastnst.data.cache.format import MANIFEST, Cache, check_matches, read_cache
from fastnst.doctor.storage import check_weights
from fastnst.errors import DataError, DivergedError, StoppedBySignal, UserError, shell_quote
from fastnst.storage import StorageError
from fastnst.training.divergence import explained_storage_errors
from fastnst.training.run_dir.layout import CONFIG_NAME
from fastnst.training.run_dir.style_folder import STYLES_NAME, saved_styles
from fastnst.training.signals import StopRequest
from fastnst.training.trainer import Trainer
from helpers.tiny_runs import before_each_step, make_small, small_config, train_small

Fastnst = Callable[..., tuple[int, str, str]]

NAMES = ["my run #1", "it's", 'a "b" $HOME `id`', "two\nlines", "tab\tbed", "-dash", "käse;&|<>*?", "plain", "~", "(!)"]


def words_after(message: str, command: str) -> list[str]:
    """The words that a shell makes of the rest of a message, from a command on."""
    return shlex.split(command + message.split(command, 1)[1])


def message_of(error: type[BaseException], work: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        work()
    return str(caught.value)


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A relative path of one awkward name, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(request.param)


def same(word: str, path: Path) -> bool:
    # A leading dash gets `./` before it.
    return Path(word) == path and not word.startswith("-")


@pytest.mark.parametrize("name", [*NAMES, "bell\a", "it's \\ \x1b[31m", os.fsdecode(b"caf\xe9 #1"), "no\xa0break", ""])
def test_shell_quote_gives_one_word_to_a_shell(name: str) -> None:
    quoted = shell_quote(name)
    command = f"printf '%s\\0' {quoted}".encode("utf-8", "strict")
    result = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert result.stdout == os.fsencode(f"./{name}" if name.startswith("-") else name) + b"\0"


def test_resume_hint_of_a_stopped_run(generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_small(monkeypatch)
    stop = StopRequest()
    before_each_step(monkeypatch, lambda _, step: setattr(stop, "signum", signal.SIGTERM if step == 2 else None))
    config = small_config(generated_photos)
    message = message_of(StoppedBySignal, lambda: train_small(config, Path("runs/my run #1"), stop=stop))
    assert words_after(message, "fastnst train") == ["fastnst", "train", "--resume", "--out", "runs/my run #1"]


def test_resume_hint_quotes_every_name(folder: Path) -> None:
    trainer = SimpleNamespace(group=SimpleNamespace(dist_env=SimpleNamespace(world_size=1)), out=folder)
    assert same(words_after(Trainer._resume_hint(trainer), "fastnst train")[-1], folder)


def test_divergence_of_one_of_several_styles_says_how_to_go_on(folder: Path) -> None:
    trainer = SimpleNamespace(styles=["a", "b"], out=folder)

    def diverge() -> None:
        with Trainer.explained_divergence(trainer):
            raise DivergedError("NaN")

    assert same(words_after(message_of(DivergedError, diverge), "fastnst train")[-1], folder / "NAME")


def test_storage_error_says_how_to_resume(folder: Path) -> None:
    folder.mkdir()
    (folder / CONFIG_NAME).write_text("")

    def fail() -> None:
        with explained_storage_errors(folder, [folder]):
            raise StorageError("no space")

    assert same(words_after(message_of(StorageError, fail), "fastnst train")[-1], folder)


def test_damaged_styles_file_says_how_to_resume(folder: Path) -> None:
    folder.mkdir()
    (folder / STYLES_NAME).write_text("no JSON")
    message = message_of(DataError, lambda: saved_styles(folder))
    assert same(words_after(message, "fastnst train")[-1], folder / "NAME")


def test_end_of_training_says_how_to_look_and_use(
    folder: Path, fastnst: Fastnst, monkeypatch: pytest.MonkeyPatch, generated_photos: Path
) -> None:
    monkeypatch.setattr("fastnst.training.train.train", lambda *_, **__: [folder / "model.safetensors"])
    style = generated_photos / "image_00.jpg"
    code, _, err = fastnst("train", "--style", style, "--data", generated_photos, "--out", f"./{folder}")
    assert code == 0, err
    look, use = err.split("; use it: ")
    assert same(words_after(look, "fastnst tensorboard")[2], folder)
    command = shlex.split(use)
    assert command[:2] == ["fastnst", "stylize"]
    assert same(command[2], folder)


def cache_in(folder: Path, source: Path) -> Cache:
    return Cache(folder, 32, "squash", str(source), (), [], [])


def test_messages_about_caches(folder: Path) -> None:
    cache = cache_in(folder, Path("photos of") / folder)
    for message in (
        cache.rebuild_hint(),
        message_of(DataError, lambda: check_matches(cache, size=32, fit="random_crop")).split(", or train with")[0],
    ):
        words = words_after(message, "fastnst data cache")
        assert same(words[3], Path("photos of") / folder)
        out = words[words.index("--out") + 1]
        assert not out.startswith("-")
        assert Path(out).name.startswith(folder.name)
    folder.mkdir()
    message = message_of(DataError, lambda: read_cache(folder))
    assert same(words_after(message, "fastnst data cache")[-1], folder)
    (folder / MANIFEST).write_text("no JSON")
    message = message_of(UserError, lambda: read_cache(folder))
    assert "--rebuild" in message
    words = words_after(message, "fastnst data cache")
    assert same(words[words.index("--out") + 1], folder)


def test_data_cache_says_how_to_train(folder: Path, fastnst: Fastnst, generated_photos: Path) -> None:
    code, _, err = fastnst("data", "cache", generated_photos, "--size", 16, "--out", f"./{folder}")
    assert code == 0, err
    assert same(words_after(err, "--data ")[1], folder)


def test_doctor_names_weights_to_remove_and_to_download(folder: Path) -> None:
    file = {"path": str(folder / "vgg.pth"), "size": 1, "sha256": "0"}
    weights = {"files": [file], "wanted": "1", "url": "https://example.org/vgg.pth", "size": 2, "part": None}
    fix = check_weights({"weights": weights}).fix
    assert fix is not None
    removal, download = fix[fix.index("  rm ") :].split("  mkdir -p ")
    assert same(shlex.split(removal)[1], folder / "vgg.pth")
    made, fetched = download.split("  curl ")
    assert same(shlex.split(made)[0], folder)
    words = shlex.split(fetched)
    assert same(words[words.index("--output") + 1], folder / "vgg.pth")
