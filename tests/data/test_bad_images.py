"""A folder with anything in it: what is refused is named, and what is accepted comes out of both loaders alike."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnst.config import DataConfig
from fastnst.data.loaders import open_loader
from fastnst.data.manifest import Manifest, build_manifest, write_rejections
from fastnst.data.sampler import Sampler
from fastnst.images import printable
from helpers.bad_image_fixtures import (
    ACCEPTED,
    EITHER,
    PASSED_OVER,
    Specimen,
    place_awkward,
    place_good,
    place_zoo,
    specimens,
)

pytest.importorskip("nvidia.dali", reason="DALI is made for Linux on x86-64 only")

PROJECT = Path(__file__).resolve().parents[2]
# As in test_loaders.py: two resamplers round alike except within their arithmetic's error of one half.
LARGEST_DIFFERENCE, LARGEST_MEAN_DIFFERENCE = 1, 0.3
MEMORY_LIMIT = 4 << 30


@pytest.fixture
def zoo(tmp_path: Path, awkward: Path) -> tuple[Path, list[Specimen]]:
    """A folder with one of each, and what they are."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    found = specimens()
    place_zoo(folder, found)
    return folder, found + place_awkward(folder, awkward)


def check_verdicts(manifest: Manifest, found: Sequence[Specimen], run: Path) -> None:
    """Each specimen as it has to be judged, and each refusal in the run's list."""
    accepted = {entry.path for entry in manifest.images}
    reasons = {rejection.path: rejection.reason for rejection in manifest.rejected}
    assert not accepted & set(reasons)
    wrong = []
    for specimen in found:
        reason = reasons.get(specimen.name)
        match specimen.verdict:
            case "":
                right = specimen.name in accepted
            case "passed over":
                right = specimen.name not in accepted and reason is None
            case "either":
                right = specimen.name in accepted or reason is not None
            case word:
                right = reason is not None and word in reason
        if not right:
            wrong.append((specimen, specimen.verdict, reason))
    assert not wrong
    for reason in reasons.values():
        assert "; " in reason, "what to do"
        assert reason.isprintable()
    write_rejections(manifest, run / "rejected.jsonl")
    rows = [json.loads(line) for line in (run / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert {row["path"]: row["reason"] for row in rows} == {printable(path): why for path, why in reasons.items()}


def load_all(loader: str, manifest: Manifest, batch_size: int = 16) -> torch.Tensor:
    count = len(manifest.images)
    order = Sampler(1, count, batch_size, -(-count // batch_size))
    config = DataConfig(loader=loader, image_size=32, workers=2)
    with open_loader(manifest, order, config, device=torch.device("cpu")) as batches:
        return torch.cat(list(batches))


def check_loaders_agree(manifest: Manifest) -> None:
    """No failure is allowed for here: what one loader could not read would be an error."""
    difference = (load_all("pillow", manifest).int() - load_all("dali", manifest).int()).abs()
    order = Sampler(1, len(manifest.images), len(difference), 1)
    wrong = [
        manifest.images[index]
        for index, one in zip(order.batch(0).indices, difference, strict=True)
        if one.max() > LARGEST_DIFFERENCE or one.double().mean() > LARGEST_MEAN_DIFFERENCE
    ]
    assert not wrong


def test_the_zoo_is_large(zoo: tuple[Path, list[Specimen]]) -> None:
    _, found = zoo
    verdicts = [specimen.verdict for specimen in found]
    assert len(found) == len({specimen.name for specimen in found}) >= 120
    assert sum(verdict not in (ACCEPTED, EITHER, PASSED_OVER) for verdict in verdicts) >= 60
    assert verdicts.count(ACCEPTED) >= 50


@pytest.mark.parametrize("percent", [10, 100])
def test_a_folder_of_which_so_much_is_odd(
    zoo: tuple[Path, list[Specimen]], generated_photos: Path, tmp_path: Path, percent: int
) -> None:
    folder, found = zoo
    place_good(folder, generated_photos, len(found) * (100 - percent) // percent)
    manifest = build_manifest(folder, workers=2, allow_uniform=False)
    check_verdicts(manifest, found, tmp_path / "run")
    check_loaders_agree(manifest)


def test_a_folder_of_which_one_percent_is_odd(generated_photos: Path, tmp_path: Path) -> None:
    chosen = specimens()[::9]
    place_zoo(tmp_path, chosen)
    place_good(tmp_path, generated_photos, len(chosen) * 99)
    manifest = build_manifest(tmp_path, workers=2, allow_uniform=False)
    check_verdicts(manifest, chosen, tmp_path / "run")
    check_loaders_agree(manifest)


@pytest.mark.campaign
def test_the_whole_zoo_as_one_percent_of_a_folder(
    zoo: tuple[Path, list[Specimen]], generated_photos: Path, tmp_path: Path
) -> None:
    """`pytest -m campaign tests/data/test_bad_images.py`: some 15,000 images, a minute or two."""
    folder, found = zoo
    place_good(folder, generated_photos, len(found) * 99)
    manifest = build_manifest(folder, workers=2, allow_uniform=False)
    check_verdicts(manifest, found, tmp_path / "run")
    check_loaders_agree(manifest)


def test_what_random_bytes_do_to_the_check_the_loaders_see_too(tmp_path: Path) -> None:
    """Specimens that may be either are judged once, by their bytes: the verdict is the same wherever they lie."""
    doubtful = [specimen for specimen in specimens() if specimen.verdict == EITHER]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        place_zoo(tmp_path / name, doubtful)
    first, second = (build_manifest(tmp_path / name, cache=False, allow_uniform=False) for name in ("a", "b"))
    assert [entry.path for entry in first.images] == [entry.path for entry in second.images]
    assert first.rejected == second.rejected
    assert first.images
    assert first.rejected


# In a process of its own, whose memory is watched: what a run does with a folder, except for the arithmetic.
SCRIPT = """
import sys, torch
from pathlib import Path
from fastnst.config import DataConfig
from fastnst.data.loaders import open_loader
from fastnst.data.manifest import build_manifest
from fastnst.data.sampler import Sampler

if __name__ == "__main__":
    manifest = build_manifest(Path(sys.argv[1]), workers=2, allow_uniform=False, cache=False)
    order = Sampler(1, len(manifest.images), 16, -(-len(manifest.images) // 16))
    for loader in ("pillow", "dali"):
        config = DataConfig(loader=loader, image_size=64, workers=2)
        with open_loader(manifest, order, config, device=torch.device("cpu")) as batches:
            print(loader, sum(len(batch) for batch in batches))
"""


def test_memory_for_the_whole_zoo(zoo: tuple[Path, list[Specimen]], tmp_path: Path) -> None:
    """Check and both loaders, all of their processes together."""
    folder, _ = zoo
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
    assert 1 << 26 < watch.peak < MEMORY_LIMIT, f"{watch.peak / 2**30:.2f} GiB"


class PeakMemory(threading.Thread):
    """The largest resident memory of a process and all that descend from it, in bytes; shared pages count once each."""

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


def test_memory_of_a_process_and_its_children_is_seen() -> None:
    """A watch that sees nothing would pass any run."""
    grown = "import time; block = b'x' * (300 << 20); print(flush=True); time.sleep(60)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grown!r}])"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    watch = PeakMemory(process.pid)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        watch.start()
        while not watch.peak:
            np.zeros(1)
        assert watch.peak > 300 << 20
    finally:
        watch.stop()
        os.killpg(process.pid, 9)
        process.communicate()
