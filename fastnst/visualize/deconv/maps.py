"""Maps of a layer by number, checked before torch is imported."""

from collections.abc import Sequence

from fastnst.errors import UserError

Activation = str | tuple[int, int]
"""Which activation of a map: `strongest`, `all`, or a row and column."""


def check_maps(layer: str, maps: Sequence[int], channels: int) -> None:
    """Raise UserError unless every map is one of the layer's `channels`."""
    wrong = [number for number in maps if not 0 <= number < channels]
    if wrong:
        raise UserError(f"{layer} has no map {wrong[0]}; its maps are 0 … {channels - 1}")
