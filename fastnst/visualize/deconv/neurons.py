"""Neurons: the activations that a deconvnet projects to pixels (Zeiler & Fergus 2014, §2.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnst.errors import UserError
from fastnst.visualize.deconv.maps import Activation, check_maps

__all__ = ["Activation", "Neurons", "check_maps", "recorded"]


@dataclass(frozen=True)
class Neurons:
    """K pairs of an image and a feature map, each with a position or with the whole map.

    A projection starts with the neuron's own activation. Layers without positions (`[N, C]`, the fully connected ones)
    count as maps of 1×1.

    Attributes:
        images: `[K]` int64, row in the batch.
        maps: `[K]` int64, channel.
        positions: `[K, 2]` int64, row and column within the map; None: all activations of the map.
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
                f"positions are {list(self.positions.shape)}, expected {[*shape, 2]}: a row and a column for each map"
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    @classmethod
    def every_position(
        cls, images: Sequence[int] | Tensor, maps: Sequence[int] | Tensor, device: torch.device | str | None = None
    ) -> "Neurons":
        """Select all activations of each map.

        Args:
            images: `[K]` rows in the batch.
            maps: `[K]` channels.
            device: of the activations; None keeps tensors where they are, and puts sequences on the CPU.
        """
        return cls(_indices(images, device), _indices(maps, device), None)

    @classmethod
    def at(
        cls,
        images: Sequence[int] | Tensor,
        maps: Sequence[int] | Tensor,
        positions: Sequence[Sequence[int]] | Tensor,
        device: torch.device | str | None = None,
    ) -> "Neurons":
        """Select one activation of each map, at `positions` `[K, 2]`; else as `every_position`."""
        places = _indices(positions, device)
        places = places if len(places) else places.reshape(-1, 2)
        return cls(_indices(images, device), _indices(maps, device), places)

    @classmethod
    def strongest(cls, activations: Tensor, images: Sequence[int] | Tensor, maps: Sequence[int] | Tensor) -> "Neurons":
        """Select the largest activation of each map; of equal ones the first in row-major order.

        Args:
            activations: `[N, C, H, W]`, or `[N, C]`, where the only position is (0, 0).
            images: `[K]` rows in the batch, all within 0 … N - 1.
            maps: `[K]` channels, all within 0 … C - 1.
        """
        rows, channels = (_indices(values, activations.device) for values in (images, maps))
        chosen = activations[rows, channels]
        width = chosen.shape[2] if chosen.ndim == 3 else 1
        first = chosen.flatten(1).argmax(1) if chosen.ndim == 3 else torch.zeros_like(rows)
        return cls(rows, channels, torch.stack((first // width, first % width), dim=1))

    @classmethod
    def select(
        cls, activations: Tensor, images: Sequence[int], maps: Sequence[int], activation: Activation
    ) -> "Neurons":
        """Select by `strongest`, `all` or the row and column of one; raise UserError for another word."""
        if activation == "strongest":
            return cls.strongest(activations, images, maps)
        if activation == "all":
            return cls.every_position(images, maps, activations.device)
        if isinstance(activation, str):
            raise UserError(f"unknown activation {activation!r}; choose strongest, all, or a row and column")
        return cls.at(images, maps, [activation] * len(images), activations.device)

    def check(self, layer: str, activations: Tensor) -> None:
        """Raise UserError unless all neurons lie within the layer's `activations`, `[N, C, H, W]` or `[N, C]`."""
        count, channels = activations.shape[:2]
        check_maps(layer, self.maps.tolist(), channels)
        if wrong := [image for image in self.images.tolist() if not 0 <= image < count]:
            raise UserError(f"the recording has no image {wrong[0]}; its images are 0 … {count - 1}")
        height, width = activations.shape[2:] if activations.ndim == 4 else (1, 1)
        for row, column in [] if self.positions is None else self.positions.tolist():
            if not (0 <= row < height and 0 <= column < width):
                raise UserError(
                    f"{layer} has no position ({row}, {column}) in this image; its rows are 0 … {height - 1}, its "
                    f"columns 0 … {width - 1}"
                )

    def to(self, device: torch.device) -> "Neurons":
        """Copy to another device."""
        positions = None if self.positions is None else self.positions.to(device)
        return Neurons(self.images.to(device), self.maps.to(device), positions)

    def __getitem__(self, part: slice) -> "Neurons":
        positions = None if self.positions is None else self.positions[part]
        return Neurons(self.images[part], self.maps[part], positions)


def check_images(images: object) -> None:
    """Raise UserError unless `images` are a dense tensor of floats, and not on the meta device."""
    if not isinstance(images, Tensor):
        raise UserError(f"images are floats [N, 3, H, W] in [0, 1], got {type(images).__name__}; give a torch.Tensor")
    if images.is_nested or images.layout != torch.strided or images.is_meta or not images.is_floating_point():
        kind = "nested" if images.is_nested else f"{images.dtype} {list(images.shape)} on {images.device}"
        layout = "" if images.layout == torch.strided else f", {images.layout}"
        raise UserError(
            f"images are floats [N, 3, H, W] in [0, 1], dense and with data, got {kind}{layout}; "
            "divide by 255 first, as fastnst.images.to_tensor does with uint8"
        )


def recorded(activations: Mapping[str, Tensor], layer: str) -> Tensor:
    """Get a layer's activations, or raise UserError if it was not recorded."""
    if layer not in activations:
        raise UserError(f"{layer} is not recorded, only {', '.join(activations)}; ask record() for it")
    return activations[layer]


def _indices(values: Sequence[int] | Sequence[Sequence[int]] | Tensor, device: torch.device | str | None) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64, device=device)
