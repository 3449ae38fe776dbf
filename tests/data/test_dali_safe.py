"""Which files DALI may decode."""

import pytest

from fastnst.data.manifest import ImageEntry, build_manifest
from helpers.bad_image_fixtures import ACCEPTED, SIZE, place_specimens, specimens


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageEntry]:
    folder = tmp_path_factory.mktemp("accepted")
    place_specimens(folder, [specimen for specimen in specimens() if specimen.verdict == ACCEPTED])
    return {entry.path: entry for entry in build_manifest(folder).images}


@pytest.mark.parametrize(
    ("safe", "names"),
    [
        (True, "gray.jpg progressive.jpg restart.jpg sampling2.jpg two.jpg opaque_alpha.png lossless.webp"),
        (
            False,
            "alpha.png clear.webp gray_alpha.png image.gif tiff.jpg modern.avif rgb.jpg cmyk.jpg deep.png moving.png "
            "moving.webp turned.png turned.webp xmp.jpg bad_exif.jpg",
        ),
    ],
)
def test_is_dali_safe(entries: dict[str, ImageEntry], safe: bool, names: str) -> None:
    assert {name: entries[name].dali_safe for name in names.split()} == dict.fromkeys(names.split(), safe)


@pytest.mark.parametrize("order", ["II", "MM"])
def test_is_dali_safe_takes_short_orientations_only(entries: dict[str, ImageEntry], order: str) -> None:
    for value in range(1, 9):
        assert entries[f"{order}_{value}_short.jpg"].dali_safe
        assert not entries[f"{order}_{value}_long.jpg"].dali_safe


def test_image_entry_has_the_size_of_the_upright_image(entries: dict[str, ImageEntry]) -> None:
    for name in ("MM_6_short.jpg", "MM_6_long.jpg", "II_8_short.jpg", "turned.png", "turned.webp", "xmp.jpg"):
        assert (entries[name].height, entries[name].width) == SIZE, name
    assert (entries["MM_3_short.jpg"].width, entries["MM_3_short.jpg"].height) == SIZE
