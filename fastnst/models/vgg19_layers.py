"""The layers of VGG19 by name, with the shapes of their weights.

Apart from the network itself, since names are checked before torch is imported, which takes seconds.
"""

import difflib
from collections.abc import Iterable, Iterator

from fastnst.errors import UserError

BLOCKS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
"""Channels and number of convolutions of each of the five blocks."""

FLAVOURS = ("torchvision", "caffe")


def _layers() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and weight shape of each layer, `()` without weights, front to back."""
    inputs = 3
    for block, (channels, convolutions) in enumerate(BLOCKS, start=1):
        for index in range(1, convolutions + 1):
            yield f"conv{block}_{index}", (channels, inputs, 3, 3)
            yield f"relu{block}_{index}", ()
            inputs = channels
        yield f"pool{block}", ()
    yield from (
        ("fc6", (4096, 512 * 7 * 7)),
        ("relu6", ()),
        ("fc7", (4096, 4096)),
        ("relu7", ()),
        ("fc8", (1000, 4096)),
    )


WEIGHT_SHAPES = {name: shape for name, shape in _layers() if shape}
"""Layer → shape of its weight; the bias has the size of the first dimension."""

LAYERS = tuple(name for name, _ in _layers())
"""All layers in order of execution."""


def deepest_layer(layers: Iterable[str]) -> str:
    """Return the deepest of `layers`, at least one; UserError for an unknown one."""
    names = list(layers)
    for name in names:
        check_layer(name)
    return max(names, key=LAYERS.index)


def check_layer(name: str) -> None:
    """Raise UserError, with the nearest name, unless VGG19 has the layer."""
    if name not in LAYERS:
        near = difflib.get_close_matches(name, LAYERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; the layers are {LAYERS[0]} … {LAYERS[-1]}"
        raise UserError(f"no VGG19 layer is named {name!r}{hint}")
