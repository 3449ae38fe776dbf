"""The DALI and Pillow loaders: the same images in the same order from any start, even after failures."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastnst.data.loaders import open_loader
from fastnst.data.manifest import Manifest, build_manifest
from fastnst.data.sampler import Fit, Sampler
from fastnst.errors import STOP_SIGNALS, DataError, UserError
from helpers.bad_image_fixtures import ACCEPTED, place_specimens, specimens
from helpers.batches import (
    CPU,
    assert_close,
    assert_loaders_agree,
    data_config,
    expected_batch,
    load,
    load_pillow_in_this_process,
    one_epoch,
    pixels_of,
)

pytest.importorskip("nvidia.dali", reason="DALI is made for Linux on x86-64 only")

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    load_pillow_in_this_process(monkeypatch)


@pytest.fixture
def manifest(generated_photos: Path) -> Manifest:
    return build_manifest(generated_photos)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("fit", "image_size"), [("random_crop", 128), ("center_crop", 48), ("squash", 100), ("random_crop", 500)]
)
def test_open_loader_dali_and_pillow_agree_on_photos(photos: Path, tmp_path: Path, fit: Fit, image_size: int) -> None:
    for file in sorted(photos.iterdir())[::32]:
        (tmp_path / file.name).symlink_to(file)
    manifest = build_manifest(tmp_path)
    assert_loaders_agree(manifest, one_epoch(manifest, fit=fit), image_size)


@pytest.mark.usefixtures("one_process")
def test_open_loader_dali_and_pillow_agree_on_damage_that_passes_the_check(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    image = Image.fromarray(np.kron(rng.integers(0, 256, (6, 8, 3), np.uint8), np.ones((10, 10, 1), np.uint8)))
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "maker"
    options: dict[str, dict[str, Any]] = {"jpg": {"exif": tags}, "png": {}, "webp": {}}
    for suffix, values in options.items():
        image.save(tmp_path / f"whole.{suffix}", **values)
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        for index in range(80):
            damaged = bytearray(whole)
            reach = (40, 250, len(whole))[index % 3]
            damaged[rng.integers(0, min(reach, len(whole)))] = rng.integers(0, 256)
            (tmp_path / f"{index:02d}.{suffix}").write_bytes(damaged[: len(whole) - index % 5 // 4])
    manifest = build_manifest(tmp_path)
    small = [entry for entry in manifest.images if entry.width * entry.height < 10**5]
    manifest = replace(manifest, images=small)
    assert len(manifest.rejected) > 80
    assert len(small) > 40
    assert_loaders_agree(manifest, one_epoch(manifest), 32)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("loader", ["dali", "pillow"])
def test_loader_delivers_what_the_sampler_draws(loader: str, manifest: Manifest) -> None:
    sampler = Sampler(3, 12, 5, 5)
    batches = load(manifest, sampler, loader)
    assert len(batches) == 5
    pixels = pixels_of(manifest.folder)
    for step, batch in enumerate(batches):
        assert batch.dtype == torch.uint8
        assert batch.shape == (5, 32, 32, 3)
        assert batch.is_contiguous()
        assert_close(batch, expected_batch(manifest, sampler, step, 32, pixels))


@pytest.mark.parametrize("loader", ["dali", "pillow"])
def test_loader_start_step_and_ranks_do_not_change_batches(loader: str, manifest: Manifest) -> None:
    alone = load(manifest, Sampler(3, 12, 6, 6), loader, workers=2)
    shared = Sampler(3, 12, 6, 6, world_size=2)
    ranks = [load(manifest, shared, loader, start_step=4, rank=rank) for rank in range(2)]
    for whole, first, second in zip(alone[4:], *ranks, strict=True):
        torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=0)
    assert load(manifest, Sampler(3, 12, 6, 6), loader, start_step=6) == []


def test_loader_folder_smaller_than_a_batch(tmp_path: Path) -> None:
    Image.new("RGB", (20, 30), (10, 20, 30)).save(tmp_path / "only.png")
    (batch,) = load(build_manifest(tmp_path), Sampler(0, 1, 7, 1), "dali")
    assert (batch == torch.tensor([10, 20, 30], dtype=torch.uint8)).all()
    assert len(batch) == 7


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("loader", ["dali", "pillow"])
def test_loader_without_a_replacer_names_an_image_that_changed(loader: str, photo_folder: Path) -> None:
    manifest = build_manifest(photo_folder)
    path = photo_folder / manifest.images[5].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{path.name}.* when the folder was checked"):
        load(manifest, Sampler(0, 12, 4, 6), loader)


def test_dali_loader_leaves_an_image_that_dali_rejects_to_pillow(
    photo_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An image wrongly marked DALI-safe neither ends the run nor changes the other images."""
    jpeg = (photo_folder / "image_00.jpg").read_bytes()
    end_of_first_segment = 4 + int.from_bytes(jpeg[4:6], "big")
    with_junk = jpeg[:end_of_first_segment] + bytes(40) + jpeg[end_of_first_segment:]
    (photo_folder / "image_00.jpg").write_bytes(with_junk)
    manifest = build_manifest(photo_folder)
    assert [entry.dali_safe for entry in manifest.images].count(False) == 1
    sampler = Sampler(0, 12, 4, 9)
    expected = load(manifest, sampler, "dali")
    mistaken = replace(manifest, images=[replace(entry, dali_safe=True) for entry in manifest.images])
    for start_step in (0, 4):
        caplog.clear()
        batches = load(mistaken, sampler, "dali", start_step=start_step)
        assert caplog.messages == ["DALI cannot decode image_00.jpg; Pillow decodes it"]
        for batch, one in zip(batches, expected[start_step:], strict=True):
            torch.testing.assert_close(batch, one, rtol=0, atol=0)


def test_dali_loader_raises_when_it_fails_twice_and_no_image_is_broken(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastnst.data.loaders import dali

    with open_loader(manifest, Sampler(0, 12, 4, 9), data_config("dali"), device=CPU) as batches:
        next(batches)
        run = dali.DaliLoader._run
        failures = []

        def fail(self: dali.DaliLoader, pipeline: Any) -> torch.Tensor:
            if pipeline.max_batch_size > 1 and len(failures) < 3:
                failures.append(pipeline)
                raise RuntimeError("out of memory\nCurrent pipeline object is no longer valid.")
            return run(self, pipeline)

        monkeypatch.setattr(dali.DaliLoader, "_run", fail)
        with pytest.raises(DataError, match=r"step 2 \(out of memory\), near image_.*; use --loader pillow"):
            next(batches)
    assert len(failures) == 2, "once more, and no more"


def test_dali_loader_batches_own_their_memory(manifest: Manifest) -> None:
    """A batch is DALI's own buffer, which DALI must not reuse while the tensor lives."""
    with open_loader(manifest, Sampler(0, 12, 4, 20), data_config("dali"), device=CPU) as batches:
        kept = [(batch, batch.clone()) for batch in batches]
    for batch in load(manifest, Sampler(1, 12, 4, 20), "dali"):
        batch.zero_()
    assert len({batch.data_ptr() for batch, _ in kept}) == 20
    for batch, copy in kept:
        assert torch.equal(batch, copy)


def test_open_loader_without_dali_names_the_other_loader(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fastnst.data.loaders.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="--loader pillow"):
        open_loader(manifest, Sampler(0, 12, 4, 9), data_config("dali"), device=CPU)


@pytest.mark.parametrize("loader", ["dali", "pillow"])
def test_loader_close_early_and_twice(loader: str, manifest: Manifest) -> None:
    batches = open_loader(manifest, Sampler(0, 12, 4, 100), data_config(loader), device=CPU)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


# Run in a process of its own, which is interrupted or killed; prints the ids of its workers. Of torch, which takes
# seconds to import, the loader needs one function.
SCRIPT = """
if __name__ == "__main__":
    import logging, multiprocessing, sys, signal, types
    from pathlib import Path

    sys.modules["torch"] = types.SimpleNamespace(from_numpy=lambda crops: crops)
    from fastnst.config import DataConfig
    from fastnst.data.loaders import open_loader
    from fastnst.data.manifest import build_manifest
    from fastnst.data.sampler import Sampler
    from fastnst.errors import STOP_SIGNALS

    logging.basicConfig(format="%(message)s")
    interrupts = []
    for signum in (*STOP_SIGNALS, signal.SIGXCPU):
        signal.signal(signum, lambda *_: interrupts.append(1))
    manifest = build_manifest(Path(sys.argv[1]))
    sampler = Sampler(0, 12, 2, 10**6)
    config = DataConfig(loader="pillow", image_size=16, workers=2)
    with open_loader(manifest, sampler, config, device=types.SimpleNamespace(type="cpu")) as loader:
        next(loader)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        after = 0
        while after < 20:
            next(loader)
            after += bool(interrupts)
    print("ended in good order", flush=True)
"""


@pytest.fixture
def process(generated_photos: Path, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(generated_photos)],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    # Its workers, too, should they have outlived it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def worker_ids(process: "subprocess.Popen[str]") -> list[int]:
    assert process.stdout is not None
    return [int(word) for word in process.stdout.readline().split()]


def test_pillow_workers_survive_stop_signals_and_are_replaced_when_killed(process: "subprocess.Popen[str]") -> None:
    workers = worker_ids(process)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    assert process.stderr is not None
    assert "ended unexpectedly; it is replaced" in process.stderr.readline()
    for signum in (*STOP_SIGNALS, signal.SIGXCPU):
        os.killpg(process.pid, signum)
    out, err = process.communicate(timeout=60)
    assert out == "ended in good order\n"
    assert err == ""
    assert process.returncode == 0


def test_pillow_workers_end_with_their_parent(process: "subprocess.Popen[str]") -> None:
    workers = worker_ids(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "the workers outlive their parent"
        time.sleep(0.05)


def is_running(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.gpu
def test_dali_loader_gpu_and_cpu_agree(photos: Path, tmp_path: Path) -> None:
    for file in sorted(photos.iterdir())[::16]:
        (tmp_path / file.name).symlink_to(file)
    place_specimens(tmp_path, [specimen for specimen in specimens() if specimen.verdict == ACCEPTED])
    manifest = build_manifest(tmp_path)
    sampler = one_epoch(manifest)
    on_gpu = load(manifest, sampler, "dali", 128, device=torch.device("cuda"))
    assert all(batch.is_cuda for batch in on_gpu)
    on_cpu = load(manifest, sampler, "dali", 128)
    difference = (torch.cat(on_gpu).cpu().int() - torch.cat(on_cpu).int()).abs().double()
    # The GPU's decoders have an inverse transform and a chroma interpolation of their own.
    assert difference.mean((1, 2, 3)).max() < 2
    assert difference.mean() < 0.7
