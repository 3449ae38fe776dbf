"""Colours under transparency: what cannot be seen does not count."""

import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastnst.images import read_image
from fastnst.images.transparency import GROUND, fill_hidden
from helpers.bad_image_fixtures import chunk, encoded, png
from helpers.lookalike_images import COLORS, GRAY, HEIGHT, WIDTH, hidden_colors, tiff

CUT = np.where(GRAY > 100, 255, 0).astype(np.uint8)


def filled(rgba: np.ndarray) -> np.ndarray:
    image = Image.fromarray(rgba)
    fill_hidden(image)
    found = np.asarray(image)
    np.testing.assert_array_equal(found[..., 3], rgba[..., 3])
    return found[..., :3]


def with_hidden(colors: np.ndarray, alpha: np.ndarray, hidden: tuple[int, ...]) -> np.ndarray:
    return np.dstack([np.where(alpha[..., None] == 0, np.uint8(hidden), colors), alpha])


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (40, 56), (33, 65), (700, 801)])
def test_fill_hidden_does_not_depend_on_hidden_colours(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    alpha = rng.choice(np.uint8([0, 0, 0, 60, 128, 255]), shape)
    alpha[0, 0] = 255
    black, noise = with_hidden(colors, alpha, (0, 0, 0)), np.dstack([colors, alpha])
    found = filled(black)
    np.testing.assert_array_equal(found, filled(noise))
    np.testing.assert_array_equal(found[alpha >= 128], colors[alpha >= 128])


def test_fill_hidden_continues_visible_colours() -> None:
    uniform = np.full((HEIGHT, WIDTH, 3), (200, 40, 90), np.uint8)
    np.testing.assert_array_equal(filled(with_hidden(uniform, CUT, (0, 0, 0))), uniform)
    found = filled(with_hidden(COLORS, CUT, (255, 0, 255))).astype(int)
    visible = COLORS[CUT == 255]
    assert (found >= visible.min(0)).all()
    assert (found <= visible.max(0)).all()
    # No edge where the visible part ends.
    assert np.abs(np.diff(found, axis=1)).max() < 20


def test_fill_hidden_changes_with_opacity_continuously() -> None:
    colors = np.where(CUT[..., None] == 0, np.uint8((255, 0, 255)), COLORS)
    before = filled(np.dstack([colors, CUT])).astype(int)
    for opacity in range(1, 256):
        now = filled(np.dstack([colors, np.maximum(CUT, opacity).astype(np.uint8)])).astype(int)
        assert np.abs(now - before).max() <= 12, opacity
        before = now
    np.testing.assert_array_equal(before, colors)


def test_fill_hidden_without_a_visible_pixel_is_white() -> None:
    found = filled(np.dstack([COLORS, np.zeros_like(GRAY)]))
    assert (found == GROUND).all()


def test_read_image_fills_hidden_colours_of_every_format(tmp_path: Path) -> None:
    found = {}
    for name, data in hidden_colors().items():
        (tmp_path / name).write_bytes(data)
        found[name] = read_image(tmp_path / name, alpha=True)
        np.testing.assert_array_equal(read_image(tmp_path / name), found[name][..., :3])
    for name, pixels in found.items():
        np.testing.assert_array_equal(pixels, found["black.png"], err_msg=name)


def test_read_image_fills_under_keys_and_palettes(tmp_path: Path) -> None:
    """Files whose transparency is no channel of 8 bits."""
    size = GRAY.shape
    key = GRAY[5, 5] == GRAY
    deep = GRAY.astype(np.uint16) * 257
    rows = {depth: _packed(GRAY >> (8 - depth), depth) for depth in (1, 2, 4)}
    made = {
        "key.png": (encoded(Image.fromarray(GRAY), "PNG", transparency=int(GRAY[5, 5])), key),
        "deep_key.png": (encoded(Image.fromarray(deep), "PNG", transparency=int(deep[5, 5])), key),
        "colour_key.png": (
            encoded(Image.fromarray(COLORS), "PNG", transparency=tuple(COLORS[5, 5].tolist())),
            (COLORS[5, 5] == COLORS).all(-1),
        ),
        "gray_alpha.tif": (
            tiff(np.dstack([GRAY, CUT]).tobytes(), size, samples=2, bits=(8, 8), extra=2),
            CUT == 0,
        ),
        "deep_alpha.tif": (
            tiff(
                (np.dstack([COLORS, CUT]).astype("<u2") * 257).tobytes(),
                size,
                **{"photometric": 2, "samples": 4, "bits": (16,) * 4, "extra": 2},
            ),
            CUT == 0,
        ),
    }
    for depth in rows:
        value = int(GRAY[5, 5]) >> (8 - depth)
        made[f"key_{depth}.png"] = (
            _shallow_png(rows[depth], depth, value),
            (GRAY >> (8 - depth)) == value,
        )
    for name, (data, hidden) in made.items():
        (tmp_path / name).write_bytes(data)
        found = read_image(tmp_path / name, alpha=True)
        assert found.shape[2] == 4, name
        np.testing.assert_array_equal(found[..., 3] == 0, hidden, err_msg=name)


def test_read_image_opaque_alpha_is_no_transparency(tmp_path: Path) -> None:
    opaque = np.dstack([COLORS, np.full_like(GRAY, 255)])
    for name in ("a.png", "a.tif", "a.webp"):
        Image.fromarray(opaque).save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
        np.testing.assert_array_equal(read_image(tmp_path / name, alpha=True), COLORS)


def _packed(values: np.ndarray, depth: int) -> bytes:
    bits = (values[..., None] >> np.arange(depth)[::-1]) & 1
    rows = np.packbits(bits.reshape(len(values), -1).astype(np.uint8), axis=1)
    return np.pad(rows, ((0, 0), (1, 0))).tobytes()


def _shallow_png(rows: bytes, depth: int, key: int) -> bytes:
    return png(WIDTH, HEIGHT, depth, 0, zlib.compress(rows), chunk(b"tRNS", key.to_bytes(2, "big")))
