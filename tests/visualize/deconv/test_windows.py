"""Windows cut out of maps."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastnst.visualize.deconv.windows import cut


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    side=st.integers(1, 8),
    corners=st.lists(st.tuples(st.integers(0, 1), st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=4),
)
def test_cut_by_brute_force(height: int, width: int, side: int, corners: list[tuple[int, int, int]]) -> None:
    maps = torch.arange(2 * 3 * height * width, dtype=torch.float32).reshape(2, 3, height, width)
    table = torch.tensor(corners)
    windows = cut(maps, table[:, 1:], side, rows=table[:, 0], fill=0.5)
    for window, (image, top, left) in zip(windows, corners, strict=True):
        for row in range(side):
            for column in range(side):
                y, x = top + row, left + column
                inside = 0 <= y < height and 0 <= x < width
                expected = maps[image, :, y, x] if inside else torch.full((3,), 0.5)
                assert torch.equal(window[:, row, column], expected)
