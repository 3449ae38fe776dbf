"""A folder of bad images: rejections name their reason, and all loaders read the accepted ones alike."""

import json
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
