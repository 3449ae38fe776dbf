"""A folder with anything in it: rejections name their reason, and all loaders read what is accepted alike."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastnst.data.manifest import Manifest, build_manifest, write_rejections
from fastnst.images import printable
from helpers.bad_image_fixtures import (
    ACCEPTED,
    EITHER,
    IGNORED,
    Specimen,
    place_awkward,
    place_good,
    place_specimens,
    specimens,
)
from helpers.batches import assert_loaders_agree, load_pillow_in_this_process, one_epoch

pytest.importorskip("nvidia.dali", reason="DALI is made for Linux on x86-64 only")

PROJECT = Path(__file__).resolve().parents[2]
MEMORY_LIMIT = 4 << 30


@pytest.fixture
def bad_images(tmp_path: Path, awkward: Path) -> tuple[Path, list[Specimen]]:
    """A folder with one of each, and their verdicts."""
    folder = tmp_path / "bad"
    folder.mkdir()
    found = specimens()
    place_specimens(folder, found)
    return folder, found + place_awkward(folder, awkward)


def check_verdicts(manifest: Manifest, found: Sequence[Specimen], run: Path) -> None:
    """Each specimen has its verdict, and each rejection stands in the run's list."""
    accepted = {entry.path for entry in manifest.images}
    reasons = {rejection.path: rejection.reason for rejection in manifest.rejected}
    assert not accepted & set(reasons)

    def is_right(specimen: Specimen) -> bool:
        is_accepted, reason = specimen.name in accepted, reasons.get(specimen.name)
        if specimen.verdict in (ACCEPTED, IGNORED):
            return is_accepted == (specimen.verdict == ACCEPTED) and reason is None
        return is_accepted or reason is not None if specimen.verdict == EITHER else specimen.verdict in (reason or "")

    wrong = [(specimen, specimen.verdict, reasons.get(specimen.name)) for specimen in found if not is_right(specimen)]
    assert not wrong
    for reason in reasons.values():
        assert "; " in reason, "what to do"
        assert reason.isprintable()
    write_rejections(manifest, run / "rejected.jsonl")
    rows = [json.loads(line) for line in (run / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert {row["path"]: row["reason"] for row in rows} == {printable(path): why for path, why in reasons.items()}


def test_build_manifest_and_loaders_on_bad_images_among_good_ones(
    bad_images: tuple[Path, list[Specimen]], generated_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_pillow_in_this_process(monkeypatch)
    folder, found = bad_images
    place_good(folder, generated_photos, len(found))
    manifest = build_manifest(folder, workers=2, allow_uniform=False)
    check_verdicts(manifest, found, tmp_path / "run")
    assert_loaders_agree(manifest, one_epoch(manifest, 16), 32)


@pytest.mark.campaign
def test_build_manifest_and_loaders_on_one_percent_of_bad_images(
    bad_images: tuple[Path, list[Specimen]], generated_photos: Path, tmp_path: Path
) -> None:
    """`pytest -m campaign tests/data/test_bad_images.py`: some 20,000 images, a minute or two."""
    folder, found = bad_images
    place_good(folder, generated_photos, len(found) * 99)
    manifest = build_manifest(folder, workers=2, allow_uniform=False)
    check_verdicts(manifest, found, tmp_path / "run")
    assert_loaders_agree(manifest, one_epoch(manifest, 16), 32, workers=2)


# In a process of its own, whose memory is watched: what a run does with a folder, except for the arithmetic.
SCRIPT = """
import sys
from pathlib import Path
from fastnst.data.manifest import build_manifest
from fastnst.data.sampler import Sampler

if __name__ == "__main__":
    import torch
    from fastnst.config import DataConfig
    from fastnst.data.loaders import open_loader

    manifest = build_manifest(Path(sys.argv[1]), workers=2, allow_uniform=False, cache=False)
    sampler = Sampler(1, len(manifest.images), 16, -(-len(manifest.images) // 16))
    for loader in ("pillow", "dali"):
        config = DataConfig(loader=loader, image_size=64, workers=2)
        with open_loader(manifest, sampler, config, device=torch.device("cpu")) as batches:
            print(loader, sum(len(batch) for batch in batches))
"""


@pytest.mark.campaign
def test_build_manifest_and_loaders_bound_their_memory(bad_images: tuple[Path, list[Specimen]], tmp_path: Path) -> None:
    """All processes of the check and of both loaders; `tests/security` watches the check alone on each change."""
    folder, _ = bad_images
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watch = PeakMemory(process.pid)
    watch.start()
    try:
        out, errors = process.communicate(timeout=600)
    finally:
        process.kill()
        watch.stop()
    assert process.returncode == 0, errors
    assert [line.split()[0] for line in out.splitlines()] == ["pillow", "dali"]
    assert len({line.split()[1] for line in out.splitlines()}) == 1
    assert 1 << 28 < watch.peak < MEMORY_LIMIT, f"{watch.peak / 2**30:.2f} GiB"


class PeakMemory(threading.Thread):
    """The largest resident memory of a process and its descendants, in bytes; shared pages count once each."""

    def __init__(self, process_id: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._root, self._done = process_id, threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, sum(_resident(each) for each in _tree(self._root)))

    def stop(self) -> None:
        self._done.set()
        self.join()


def _tree(process_id: int) -> list[int]:
    try:
        texts = [path.read_text() for path in Path(f"/proc/{process_id}/task").glob("*/children")]
    except OSError:
        return []
    return [process_id, *(each for text in texts for word in text.split() for each in _tree(int(word)))]


def _resident(process_id: int) -> int:
    try:
        return int(Path(f"/proc/{process_id}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
