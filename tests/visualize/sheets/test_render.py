"""Numbers as colours, and images on sheets."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastnst.errors import DataError
from fastnst.visualize.sheets.render import (
    Row,
    about_grey,
    colour_scale,
    contact_sheet,
    drawable,
    heat_map,
    mosaic,
    number,
    overlay,
)


def blocks(*colours: tuple[float, float, float], side: int = 100) -> list[Tensor]:
    return [torch.tensor(colour).reshape(3, 1, 1).expand(3, side, side) for colour in colours]


def ink(sheet: np.ndarray) -> np.ndarray:
    """`[H, W]`, where something is drawn."""
    return (sheet != 255).any(axis=2)


def where(sheet: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the pixels of one colour."""
    rows, columns = np.nonzero((sheet == colour).all(axis=2))
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


# Colours.


def test_colour_scale_ignores_zeros_and_outliers() -> None:
    values = torch.cat([torch.zeros(50_000), torch.arange(1, 1001) * torch.tensor([1.0, -1.0]).repeat(500)])
    assert colour_scale(values) == 999
    values[-1] = 1e9
    assert colour_scale(values.reshape(3, -1)) == 999
    assert colour_scale(torch.zeros(1, 3, 4, 4)) == 1.0
    assert colour_scale(torch.tensor([0.0, -2.5])) == 2.5


@given(scale=st.floats(1e-30, 1e30), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_about_grey_maps_zero_to_exact_mid_grey(scale: float, dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, scale, -scale, 2 * scale, -2 * scale, scale / 2], dtype=dtype).reshape(6, 1, 1, 1)
    images = about_grey(values.expand(6, 3, 2, 2), scale)
    assert images.shape == (6, 3, 2, 2)
    assert images.dtype == dtype
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([0.5, 1, 0, 1, 0, 0.75], dtype=dtype))
    assert (images[0] == 0.5).all()


def lightness(colours: Tensor) -> Tensor:
    """CIE L* of sRGB colours `[K, 3]`."""
    linear = torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    y = linear @ torch.tensor([0.2126, 0.7152, 0.0722])
    return torch.where(y > 0.008856, 116 * y ** (1 / 3) - 16, 903.3 * y)


def test_heat_map_grows_lighter_by_even_steps() -> None:
    colours = heat_map(torch.linspace(0, 3, 65).reshape(1, 1, 65), scale=3.0)[0, :, 0].T
    assert lightness(colours).diff().min() > 0.5
    eighths = lightness(colours)[::8].diff()
    assert eighths.min() > 0.75 * eighths.mean()
    assert eighths.max() < 1.25 * eighths.mean()
    assert colours[0].max() < 0.02
    assert lightness(colours)[-1] > 95


def test_heat_map_signed_is_white_at_zero_and_symmetric() -> None:
    colours = heat_map(torch.tensor([[[-5.0, -2.0, 0.0, 2.0, 5.0, 50.0]]]), signed=True, scale=5.0)[0, :, 0].T
    assert colours[2].tolist() == [1, 1, 1]
    blue, red = colours[0], colours[4]
    assert blue[2] > blue[0]
    assert red[0] > red[2]
    torch.testing.assert_close(colours[5], colours[4])
    light = lightness(colours)
    assert light[0] < light[1] < light[2] > light[3] > light[4]
    assert abs(light[1] - light[3]) < 12


def test_heat_map_default_scale_clamps_below_zero() -> None:
    values = torch.tensor([[[-7.0, 0.0], [2.0, 4.0]]], dtype=torch.float64)
    torch.testing.assert_close(heat_map(values), heat_map(values.clamp(min=0), scale=7.0))
    assert heat_map(values).shape == (1, 3, 2, 2)
    assert heat_map(values).dtype == torch.float64


def test_overlay_blends_heat_over_grey() -> None:
    photo = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
    laid = overlay(photo, torch.zeros(1, 3, 1, 1), opacity=0.5)
    torch.testing.assert_close(laid.flatten(), torch.full((3,), 0.299 / 2))
    torch.testing.assert_close(overlay(photo, torch.ones(1, 3, 1, 1), opacity=1.0), torch.ones(1, 3, 1, 1))


def test_render_functions_do_not_change_inputs() -> None:
    values = torch.randn(2, 3, 5, 5)
    before = values.clone()
    about_grey(values, 1.0)
    colour_scale(values)
    heat_map(values[:, 0])
    overlay(values, values)
    mosaic(values)
    torch.testing.assert_close(values, before, rtol=0, atol=0)


# Sheets.


def test_contact_sheet_holds_images_unchanged_on_white() -> None:
    red, green, blue = blocks((1, 0, 0), (0, 1, 0), (0, 0, 1), side=120)
    sheet = contact_sheet([Row([red, green], ["red", "green"]), Row([blue], ["blue"])], title="Colours")
    assert sheet.dtype == np.uint8
    r, g, b = (where(sheet, colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    for top, left, bottom, right in (r, g, b):
        assert (bottom - top, right - left) == (120, 120)
    assert r[0] == g[0]
    assert r[3] < g[1]
    assert r[2] < b[0]
    assert r[1] == b[1]
    margin = np.concatenate([sheet[:20].ravel(), sheet[-20:].ravel(), sheet[:, :20].ravel(), sheet[:, -20:].ravel()])
    assert (margin == 255).all()


def test_contact_sheet_scales_small_and_large_images() -> None:
    checks = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]).expand(3, 2, 3)
    sheet = contact_sheet([Row([checks], [""])])
    top, left, bottom, right = where(sheet, (0, 0, 0))
    assert (bottom - top, right - left) == (64, 96)
    assert (sheet[top : top + 32, left : left + 32] == 0).all()
    assert (sheet[top : top + 32, left + 32 : left + 64] == 255).all()
    large = torch.zeros(3, 30, 1100)
    large[0] = 1
    top, left, bottom, right = where(contact_sheet([Row([large], [""])]), (255, 0, 0))
    assert (bottom - top, right - left) == (10, 367)
    top, left, bottom, right = where(contact_sheet([Row([large], [""])], largest=1100), (255, 0, 0))
    assert (bottom - top, right - left) == (30, 1100)


LONG = "a_name_without_any_space_that_is_far_too_long_for_its_column_" * 4 + "end.jpg"


@pytest.mark.parametrize("on_top", [False, True])
@pytest.mark.parametrize("captions", [["a", "b"], [LONG, "b"], ["many short words " * 9, LONG], ["", ""]])
def test_contact_sheet_captions_stay_within_their_column(captions: list[str], on_top: bool) -> None:
    tiles = blocks((1, 0, 0), (0, 0, 1))
    sheet = contact_sheet([Row(tiles, captions)], captions_on_top=on_top)
    boxes = [where(sheet, (255, 0, 0)), where(sheet, (0, 0, 255))]
    text = ink(sheet)
    for (top, left, bottom, right), caption in zip(boxes, captions, strict=True):
        text[top:bottom, left:right] = False
        column = text[:, left:right]
        rows = np.nonzero(column.any(axis=1))[0]
        assert bool(len(rows)) == bool(caption)
        if caption:
            assert rows.max() < top if on_top else rows.min() >= bottom
            assert 6 <= rows.max() - rows.min() + 1 <= 3 * 18
    # No text outside the two columns: none is cut, none reaches over.
    for top, left, _, right in boxes:
        assert top > 0
        text[:, left:right] = False
    assert not text.any()


def test_contact_sheet_shortens_captions_in_the_middle() -> None:
    (tile,) = blocks((1, 0, 0))
    whole = contact_sheet([Row([tile], [LONG])])
    changed = {"b" + LONG[1:]: False, LONG[:-1] + "x": False, LONG[:120] + "M" + LONG[121:]: True}
    for caption, looks_alike in changed.items():
        assert np.array_equal(whole, contact_sheet([Row([tile], [caption])])) == looks_alike


@hypothesis.settings(max_examples=40)
@given(
    title=st.text(max_size=300),
    note=st.text(max_size=300),
    captions=st.lists(st.text(max_size=80), min_size=1, max_size=4),
)
def test_contact_sheet_keeps_any_text_within_margins(title: str, note: str, captions: list[str]) -> None:
    tiles = blocks(*[(0.5, 0.5, 0.5)] * len(captions), side=40)
    sheet = contact_sheet([Row(tiles, captions, label=title)], title=title, note=note)
    margin = np.concatenate([sheet[:16].ravel(), sheet[-16:].ravel(), sheet[:, :20].ravel(), sheet[:, -20:].ravel()])
    assert (margin == 255).all()
    # All lines of the title are there: the more, the lower the image.
    again = contact_sheet([Row(tiles, captions, label=title)], note=note)
    assert sheet.shape[0] >= again.shape[0]


def test_contact_sheet_wraps_long_titles() -> None:
    (tile,) = blocks((1, 0, 0))
    one = contact_sheet([Row([tile], [""])], title="word")
    many = contact_sheet([Row([tile], [""])], title="word " * 100)
    assert many.shape[1] == one.shape[1]
    assert many.shape[0] > one.shape[0] + 200


def test_contact_sheet_captions_on_top_and_note_below() -> None:
    row = Row(blocks((1, 0, 0), (0, 0, 1), side=200), ["photo", "conv1_1"])
    sheet = contact_sheet([row], note="grey = 0; black/white = ±0.0123", captions_on_top=True)
    top, left, bottom, right = where(sheet, (255, 0, 0))
    text = ink(sheet)
    assert text[:top].any()
    assert text[bottom:].any()
    columns = np.nonzero(text[:top, left:right].any(axis=0))[0]
    assert abs((columns.min() + columns.max()) / 2 - 100) <= 2, "the name is centred"


def test_drawable_replaces_missing_letters() -> None:
    assert drawable("grüße × 3 – α 日\udce9") == "gruße x 3 - ? ??".replace("ß", "ss")
    assert drawable("map 17 · ±0.0123 @ (14, 9) … conv3_4 #%&") == "map 17 · ±0.0123 @ (14, 9) ... conv3_4 #%&"


def test_contact_sheet_refuses_nan() -> None:
    with pytest.raises(DataError, match="NaN"):
        contact_sheet([Row([torch.full((3, 20, 20), torch.nan)], [""])])
    with pytest.raises(DataError, match="NaN"):
        contact_sheet([Row([heat_map(torch.full((1, 20, 20), torch.nan), scale=1.0)], [""])])


def test_mosaic_joins_images_in_rows() -> None:
    images = torch.arange(5).float().div(10).reshape(5, 1, 1, 1).expand(5, 3, 32, 64)
    whole = mosaic(images, 3)
    assert whole.shape == (3, 2 * 32 + 3, 3 * 64 + 2 * 3)
    for index in range(5):
        row, column = index // 3 * 35, index % 3 * 67
        torch.testing.assert_close(whole[:, row : row + 32, column : column + 64], images[index])
    assert (whole[:, 35:, 134:] == 1).all()
    assert (whole[:, 32:35] == 1).all()
    assert mosaic(images[:1, :, :3, :3], 1).shape == (3, 66, 66)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0"), (1.0, "1"), (0.0123, "0.0123"), (12.34, "12.3"), (-4574.0, "-4570"), (99_949.0, "99900")),
        *((99_951.0, "1e5"), (9_030_000.0, "9.03e6"), (0.00012345, "1.23e-4"), (999.6, "1000")),
    ],
)
def test_number_formats_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@given(st.floats(-1e30, 1e30).filter(lambda value: value == 0 or abs(value) > 1e-30))
def test_number_is_right_to_three_digits(value: float) -> None:
    assert float(number(value)) == pytest.approx(value, rel=0.0051)
