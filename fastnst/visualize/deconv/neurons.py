"""Seeds: which activations a deconvnet sends back to pixels, all others being zero (Zeiler & Fergus 2014, §2.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnst.errors import UserError


@dataclass(frozen=True)
class Seeds:
    """K pairs of an image and a feature map, each with a position or with the whole map.

    A seed carries the activation's own value. Layers without positions (`[N, C]`, the fully connected ones) count as
    maps of 1×1.

    Attributes:
        images: `[K]` int64, row in the batch.
        maps: `[K]` int64, channel.
        positions: `[K, 2]` int64, row and column within the map; None means all activations of the map.
    """

    images: Tensor
    maps: Tensor
    positions: Tensor | None

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if len(shape) != 1 or tuple(self.maps.shape) != shape:
            raise UserError(
                f"images {list(shape)} and maps {list(self.maps.shape)} do not pair up; give as many of one as of "
                "the other"
            )
        if self.positions is not None and tuple(self.positions.shape) != (*shape, 2):
            raise UserError(
                f"positions are {list(self.positions.shape)}, expected {[*shape, 2]}: a row and a column for each seed"
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    @classmethod
    def every_position(
        cls, images: Sequence[int] | Tensor, maps: Sequence[int] | Tensor, device: torch.device | str | None = None
    ) -> "Seeds":
        """All activations of each map at once.

        Args:
            images: `[K]` rows in the batch.
            maps: `[K]` channels.
            device: where the activations are; None keeps tensors where they are, and puts sequences on the CPU.
        """
        return cls(_indices(images, device), _indices(maps, device), None)

    @classmethod
    def at(
        cls,
        images: Sequence[int] | Tensor,
        maps: Sequence[int] | Tensor,
        positions: Sequence[Sequence[int]] | Tensor,
        device: torch.device | str | None = None,
    ) -> "Seeds":
        """One activation of each map: `positions` holds `[K, 2]` rows and columns; the rest as in `every_position`."""
        places = _indices(positions, device)
        return cls(
            _indices(images, device), _indices(maps, device), places.reshape(-1, 2) if not len(places) else places
        )

    @classmethod
    def strongest(cls, activations: Tensor, images: Sequence[int] | Tensor, maps: Sequence[int] | Tensor) -> "Seeds":
        """The largest activation of each map, the first in row-major order where several are equal.

        Args:
            activations: `[N, C, H, W]`, or `[N, C]`, whose only position is (0, 0).
            images: `[K]` rows in the batch, all within 0 … N - 1.
            maps: `[K]` channels, all within 0 … C - 1.
        """
        rows, channels = (_indices(values, activations.device) for values in (images, maps))
        chosen = activations[rows, channels]
        width = chosen.shape[2] if chosen.ndim == 3 else 1
        first = chosen.flatten(1).argmax(1) if chosen.ndim == 3 else torch.zeros_like(rows)
        return cls(rows, channels, torch.stack((first // width, first % width), dim=1))

    def to(self, device: torch.device) -> "Seeds":
        """The same seeds on another device."""
        positions = None if self.positions is None else self.positions.to(device)
        return Seeds(self.images.to(device), self.maps.to(device), positions)

    def __getitem__(self, part: slice) -> "Seeds":
        positions = None if self.positions is None else self.positions[part]
        return Seeds(self.images[part], self.maps[part], positions)


def check_maps(layer: str, maps: Sequence[int], channels: int) -> None:
    """UserError, with the range, unless every map is one of the layer's `channels`."""
    wrong = [number for number in maps if not 0 <= number < channels]
    if wrong:
        raise UserError(f"{layer} has no map {wrong[0]}; its maps are 0 … {channels - 1}")


def _indices(values: Sequence[int] | Sequence[Sequence[int]] | Tensor, device: torch.device | str | None) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64, device=device)
