"""The strongest activations of VGG19's maps in a folder (Zeiler & Fergus 2014, §4.1 and Figure 2).

One pass over the images finds the strongest activations of the maps; a second one, over the images that hold them,
projects each back to pixels and cuts out its receptive field.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnst.errors import UserError
from fastnst.models.vgg19 import VGG19
from fastnst.visualize.attribution.folder_batches import CenterCrops, to_images
from fastnst.visualize.attribution.targets import check_at_least_one
from fastnst.visualize.deconv import windows
from fastnst.visualize.deconv.neurons import Neurons, check_maps
from fastnst.visualize.deconv.receptive_field import crop_size, receptive_field
from fastnst.visualize.deconv.vgg import Deconvnet

COUNT = 9
"""Activations per map, as in the figure: three by three."""
GREY = 0.5
"""Value outside an image."""
_MAX_NEURONS = 256
_MAX_PIXELS = 2**20
"""Of windows that are projected together; on the 64 maps of the first block they take 268 MB."""


@dataclass(frozen=True)
class TopActivations:
    """The strongest activations of M maps; all tensors are on the CPU.

    An image appears at most once in a map's row, with its strongest position: neighbouring positions of one texture
    would crowd out all other images.

    Attributes:
        layer: of the maps.
        maps: M channels.
        values: `[M, count]`, descending; -inf where there are fewer images than `count`.
        images: `[M, count]` int64, index into the manifest's `images`; -1 where there are fewer.
        positions: `[M, count, 2]` int64, row and column in the map; -1 where there are fewer.
    """

    layer: str
    maps: tuple[int, ...]
    values: Tensor
    images: Tensor
    positions: Tensor

    def select(self, rows: Sequence[int]) -> "TopActivations":
        """Keep these rows only."""
        index = list(rows)
        maps = tuple(self.maps[row] for row in index)
        return TopActivations(self.layer, maps, self.values[index], self.images[index], self.positions[index])


@dataclass(frozen=True)
class TopPatches:
    """The receptive fields of the strongest activations, which may reach beyond the image.

    Attributes: both `[M, count, 3, s, s]` float32 on the CPU.
        projections: of the activation alone, signed; 0 outside the image.
        patches: of the image, RGB in [0, 1]; grey (0.5) outside the image.
    """

    projections: Tensor
    patches: Tensor

    def select(self, rows: Sequence[int]) -> "TopPatches":
        """Keep these rows only."""
        index = list(rows)
        return TopPatches(self.projections[index], self.patches[index])


class RunningTop:
    """The `count` strongest images of each of M maps so far; its size does not grow with the images.

    Of equal activations the image with the lower index comes first, so the result depends neither on the order of the
    images nor on the batches.
    """

    def __init__(self, maps: int, count: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.full((maps, count), -torch.inf, dtype=dtype, device=device)
        self.images = torch.full((maps, count), -1, dtype=torch.int64, device=device)
        self.positions = torch.full((maps, count, 2), -1, dtype=torch.int64, device=device)

    def merge(self, values: Tensor, images: Tensor, positions: Tensor) -> None:
        """Add images `[B]` with each map's strongest activations `[M, B]` and their positions `[M, B, 2]`."""
        maps, count = self.values.shape
        values = torch.cat((self.values, values), dim=1)
        images = torch.cat((self.images, images.expand(maps, -1)), dim=1)
        positions = torch.cat((self.positions, positions), dim=1)
        # `topk` does not define which of equal values it takes; two sorts, the second stable, do.
        by_image = images.argsort(dim=1)
        by_value = values.gather(1, by_image).argsort(dim=1, descending=True, stable=True)
        best = by_image.gather(1, by_value)[:, :count]
        self.values, self.images = values.gather(1, best), images.gather(1, best)
        self.positions = positions.gather(1, best[:, :, None].expand(-1, -1, 2))


@torch.no_grad()
def find_top_activations(
    net: VGG19,
    crops: CenterCrops,
    layer: str,
    maps: Sequence[int] | None = None,
    *,
    count: int = COUNT,
    progress: Callable[[int, int], None] | None = None,
) -> TopActivations:
    """Find the strongest activations of feature maps in a folder, by one pass over it.

    Time does not depend on the number of maps, nor memory on the number of images.

    Args:
        net: loaded at least up to `layer`.
        crops: of the folder, on the net's device, at least as large as the layer's receptive field.
        layer: up to `pool5`.
        maps: channels; None means all.
        count: activations per map. Those of a dead map are zeros, at position (0, 0).
        progress: called after each batch with the number of images done and in all.

    Raises:
        UserError: an unsuitable layer, a map out of range, crops smaller than the receptive field, or a count below 1.
        DataError: an image that changed since the folder was checked.
    """
    chosen = _check_maps(net, layer, maps)
    crop_size(layer, crops.size)
    check_at_least_one("count", count)
    report = progress or (lambda _done, _total: None)
    report(0, len(crops))
    channels = torch.tensor(chosen, device=crops.device)
    top = RunningTop(len(chosen), count, dtype=net.mean.dtype, device=crops.device)
    done = 0
    with closing(iter(crops)) as batches:
        for indices, batch in batches:
            activations = net(to_images(batch, net.mean.dtype), [layer])[layer]
            values, places = activations.flatten(2).max(2)
            values, places = values.T[channels], places.T[channels]
            width = activations.shape[3]
            top.merge(values, indices.to(crops.device), torch.stack((places // width, places % width), dim=2))
            done += len(indices)
            report(done, len(crops))
    return TopActivations(layer, chosen, top.values.cpu(), top.images.cpu(), top.positions.cpu())


@torch.no_grad()
def project_top(
    net: VGG19,
    crops: CenterCrops,
    top: TopActivations,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> TopPatches:
    """Project the strongest activations back to pixels, and cut out their receptive fields.

    Only images that hold one of them are read, once each. The result takes 24·M·count·s² bytes, s being the layer's
    receptive field: 127 MB for nine activations of each map of `relu3_4`, 7.9 GB for `pool5`: pass few maps at a time.

    Args:
        net, crops: the same as for `find_top_activations`.
        top: its result.
        progress: called after each batch with the number of images done and to be read.

    Returns:
        Projections and patches; 0 and grey where there are fewer images than `count`.

    Raises:
        UserError, DataError: as `find_top_activations`.
    """
    _check_maps(net, top.layer, top.maps)
    assert top.images.max() < len(crops), "the images of another folder"
    side = receptive_field(top.layer).size
    at_once = max(1, min(_MAX_NEURONS, _MAX_PIXELS // side**2))
    slots = top.images.numel()
    projections = torch.zeros(slots, 3, side, side)
    patches = torch.full_like(projections, GREY)

    kept, of_slot = top.images.flatten().unique(return_inverse=True)
    if kept[0] < 0:
        kept, of_slot = kept[1:], of_slot - 1
    report = progress or (lambda _done, _total: None)
    report(0, len(kept))
    deconvnet = Deconvnet(net)
    channels = torch.tensor(top.maps).repeat_interleave(top.images.shape[1])
    positions = top.positions.flatten(0, 1)
    done = 0
    with closing(iter(crops.subset(kept.tolist()))) as batches:
        for indices, batch in batches:
            recording = deconvnet.record(to_images(batch, net.mean.dtype), [top.layer])
            images = to_images(batch, torch.float32)
            rows, here = (of_slot == indices[:, None]).nonzero(as_tuple=True)
            for part_rows, part in zip(rows.split(at_once), here.split(at_once), strict=True):
                neurons = Neurons.at(part_rows, channels[part], positions[part], crops.device)
                projected, corners = deconvnet.project_patches(recording, top.layer, neurons)
                projections[part] = projected.to("cpu", torch.float32)
                patches[part] = windows.cut(images, corners, side, rows=part_rows, fill=GREY).cpu()
            done += len(indices)
            report(done, len(kept))
    shape = (*top.images.shape, 3, side, side)
    return TopPatches(projections.reshape(shape), patches.reshape(shape))


def _check_maps(net: VGG19, layer: str, maps: Sequence[int] | None) -> tuple[int, ...]:
    # Raises for layers without positions.
    receptive_field(layer)
    channels = Deconvnet(net).channels(layer)
    chosen = tuple(range(channels)) if maps is None else tuple(maps)
    if not chosen:
        raise UserError(f"no map of {layer} was given; choose some of 0 … {channels - 1}")
    check_maps(layer, chosen, channels)
    return chosen
