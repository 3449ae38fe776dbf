"""The counterpart of each kind of layer of VGG19, applied to signals on their way from a layer down to the pixels.

Legend: K signals; C channels; h×w what is carried of a map, all of it or a window. See `deconvnet` for the method.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst.visualize.deconv import windows
from fastnst.visualize.deconv.neurons import Seeds
from fastnst_kernels import max_unpool2d_switches


@dataclass(frozen=True)
class Signal:
    """K signals at one layer, which may lie in one channel each, and in a window each.

    Attributes:
        values: `[K, C, h, w]`; `[K, C]` from fc6 on.
        images: `[K]`, whose switches to go by.
        size: height and width of the layer's whole map; (1, 1) from fc6 on.
        maps: `[K]`, the only channel of each that is not zero, C being 1; None where all C are carried.
        corners: `[K, 2]`, where in the map each window begins; None where h×w is the whole map.
    """

    values: Tensor
    images: Tensor
    size: tuple[int, int]
    maps: Tensor | None
    corners: Tensor | None


def seeded(activations: Tensor, seeds: Seeds) -> Signal:
    """What to begin with: each seed's own value in its channel, at its position or everywhere in the map."""
    images, maps = seeds.images, seeds.maps
    if activations.ndim == 2:
        return Signal(activations[images, maps].unsqueeze(1), images, (1, 1), maps, None)
    size = (activations.shape[2], activations.shape[3])
    if seeds.positions is None:
        return Signal(activations[images, maps].unsqueeze(1), images, size, maps, None)
    rows, columns = seeds.positions.unbind(1)
    values = activations[images, maps, rows, columns].reshape(-1, 1, 1, 1)
    return Signal(values, images, size, maps, seeds.positions)


def whole(activations: Tensor, first: int, last: int) -> Signal:
    """Everything in the images `first` … `last` - 1."""
    values = activations[first:last].clone()
    size = (values.shape[2], values.shape[3]) if values.ndim == 4 else (1, 1)
    return Signal(values, torch.arange(first, last, device=values.device), size, None, None)


def convolution(signal: Signal, weight: Tensor) -> Signal:
    """Σ over the 3×3 offsets d of y[i − d]·weight[d]: a convolution with the filters turned by 180°.

    Windows grow by one pixel on every side, unless the map is no larger than that.
    """
    signal = _whole_unless_smaller(signal)
    turned = weight.flip(2, 3)
    # A window takes in all that its entries reach; a whole map ends where it ends.
    padding = 1 if signal.corners is None else 2
    if signal.maps is None:
        turned = turned.transpose(0, 1).contiguous(memory_format=torch.channels_last)
        values = F.conv2d(signal.values, turned, padding=padding)
    else:
        # Of the filters only the column of the one map that is not zero takes part: sums of 9 terms.
        columns = turned[signal.maps].flatten(2).transpose(1, 2)
        neighbours = F.unfold(signal.values, 3, padding=padding).transpose(1, 2)
        height, width = (side + 2 * padding - 2 for side in signal.values.shape[2:])
        values = torch.bmm(neighbours, columns).unflatten(1, (height, width)).permute(0, 3, 1, 2)
    if signal.corners is None:
        return replace(signal, values=values, maps=None)
    corners = signal.corners - 1
    return replace(signal, values=windows.clear_outside(values, corners, signal.size), maps=None, corners=corners)


def unpool(signal: Signal, switches: Tensor, size: tuple[int, int]) -> Signal:
    """Each value goes to where the maximum had come from.

    Args:
        signal: at the pool's output.
        switches: `[N, C, h, w]` of all images.
        size: height and width of what was pooled.
    """
    if signal.corners is None:
        chosen = switches[signal.images] if signal.maps is None else switches[signal.images, signal.maps, None]
        return replace(signal, values=max_unpool2d_switches(signal.values, chosen, size), size=size)
    # Where a window overhangs, its signal is 0, whichever way that is switched.
    side = signal.values.shape[-1]
    chosen = windows.cut_clamped(switches, signal.images, signal.maps, signal.corners, side)
    values = max_unpool2d_switches(signal.values, chosen, (2 * side, 2 * side))
    return replace(signal, values=values, size=size, corners=2 * signal.corners)


def matrix(signal: Signal, weight: Tensor) -> Signal:
    """A fully connected layer's transposed matrix; `weight` `[outputs, inputs]`."""
    values = signal.values @ weight if signal.maps is None else signal.values * weight[signal.maps]
    return replace(signal, values=values, maps=None)


def averaging(signal: Signal, size: tuple[int, int]) -> Signal:
    """The adjoint of averaging maps of `size` to 7×7 and flattening them, which fc6 begins with."""
    values = signal.values.unflatten(1, (-1, 7, 7))
    # In each channel the averaging is A x Bᵀ. Averaging the identity matrix gives Aᵀ, and Bᵀ.
    a, b = (F.adaptive_avg_pool1d(torch.eye(side, dtype=values.dtype, device=values.device), 7) for side in size)
    return replace(signal, values=(a @ values @ b.T).contiguous(memory_format=torch.channels_last), size=size)


def _whole_unless_smaller(signal: Signal) -> Signal:
    height, width = signal.size
    if signal.corners is None or (signal.values.shape[-1] + 2) ** 2 < height * width:
        return signal
    shape = (*signal.values.shape[:2], height, width)
    values = signal.values.new_zeros(shape).contiguous(memory_format=torch.channels_last)
    windows.put_back(signal.values, signal.corners, values)
    return replace(signal, values=values, corners=None)
