"""A folder of bad images: rejections name their reason, and all loaders read the accepted ones alike."""

import json
import os
import subprocess
import sys
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


@pytest.fixture
def bad_images(tmp_path: Path, awkward: Path) -> tuple[Path, list[Specimen]]:
    """A folder with one of each, and their verdicts."""
    folder = tmp_path / "bad"
    folder.mkdir()
    found = specimens()
    place_specimens(folder, found)
    return folder, found + place_awkward(folder, awkward)


def check_verdicts(manifest: Manifest, found: Sequence[Specimen], run: Path) -> None:
    """Each specimen has its verdict, and each rejection is in the run's list."""
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
        assert "; " in reason, "no advice"
        assert reason.isprintable()
    write_rejections(manifest, run / "rejected.jsonl")
    rows = [json.loads(line) for line in (run / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert all(set(row) == {"path", "reason"} for row in rows)
    assert {row["path"]: row["reason"] for row in rows} == {printable(path): why for path, why in reasons.items()}


@pytest.mark.parametrize("good_per_bad", [1, pytest.param(99, marks=pytest.mark.campaign)])
def test_build_manifest_and_loaders_on_bad_images_among_good_ones(
    *,
    bad_images: tuple[Path, list[Specimen]],
    generated_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    good_per_bad: int,
) -> None:
    """`pytest -m campaign tests/data/test_bad_images.py`: some 20,000 images, a minute or two."""
    load_pillow_in_this_process(monkeypatch)
    folder, found = bad_images
    place_good(folder, generated_photos, len(found) * good_per_bad)
    manifest = build_manifest(folder, workers=2, allow_uniform=False)
    assert build_manifest(folder, allow_uniform=False) == manifest, "from the cache"
    check_verdicts(manifest, found, tmp_path / "run")
    assert_loaders_agree(manifest, one_epoch(manifest, 16), 32)


# A process of its own, since the peak of a process is that of its whole life.
SCRIPT = """
import resource, sys, torch
from pathlib import Path
from fastnst.config import DataConfig
from fastnst.data.loaders import open_loader
from fastnst.data.manifest import build_manifest
from fastnst.data.sampler import Sampler

if __name__ == "__main__":
    manifest = build_manifest(Path(sys.argv[1]), workers=2, allow_uniform=False, cache=False)
    sampler = Sampler(1, len(manifest.images), 16, -(-len(manifest.images) // 16))
    for loader in ("pillow", "dali"):
        config = DataConfig(loader=loader, image_size=64, workers=2)
        with open_loader(manifest, sampler, config, device=torch.device("cpu")) as batches:
            print(loader, sum(len(batch) for batch in batches))
    print(*(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


def test_build_manifest_and_loaders_bound_memory(bad_images: tuple[Path, list[Specimen]], tmp_path: Path) -> None:
    """Decompression bombs among the images: the process and two workers stay below 4 GiB."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(script), str(bad_images[0])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    pillow, dali, peaks = (line.split() for line in done.stdout.splitlines())
    assert (pillow[0], dali[0], pillow[1]) == ("pillow", "dali", dali[1])
    own, largest_worker = (int(kib) << 10 for kib in peaks)
    assert largest_worker > 1 << 26
    assert own + 2 * largest_worker < 4 << 30
