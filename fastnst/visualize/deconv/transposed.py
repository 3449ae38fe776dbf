"""The counterparts of VGG19's layers, which reconstruct a layer's input signal from its output signal.

Legend: K signals; C channels; h×w the map, or a window of it. See `vgg.py` for the method.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst.visualize.deconv import windows
from fastnst.visualize.deconv.neurons import Neurons
from fastnst_kernels import max_unpool2d_switches


@dataclass(frozen=True)
class Signal:
    """K signals reconstructed at one layer; each may be limited to one channel and to a window.

    Attributes:
        values: `[K, C, h, w]`; `[K, C]` from fc6 on.
        images: `[K]`, row in the batch, for the pools' switches.
        size: height and width of the layer's whole map; (1, 1) from fc6 on.
        maps: `[K]`, the only nonzero channel of each, C being 1; None: `values` hold all channels.
        corners: `[K, 2]`, row and column in the map where each window begins; None: h×w is the whole map.
    """

    values: Tensor
    images: Tensor
    size: tuple[int, int]
    maps: Tensor | None
    corners: Tensor | None


def start(activations: Tensor, neurons: Neurons) -> Signal:
    """Start from single neurons: each one's activation, at its position or everywhere in its map."""
    images, maps = neurons.images, neurons.maps
    size = (activations.shape[2], activations.shape[3]) if activations.ndim == 4 else (1, 1)
    if activations.ndim == 2 or neurons.positions is None:
        return Signal(activations[images, maps].unsqueeze(1), images, size, maps, None)
    rows, columns = neurons.positions.unbind(1)
    values = activations[images, maps, rows, columns].reshape(-1, 1, 1, 1)
    return Signal(values, images, size, maps, neurons.positions)


def start_layer(activations: Tensor, first: int, last: int) -> Signal:
    """Start from all activations of the images `first` … `last` - 1."""
    values = activations[first:last].clone()
    size = (values.shape[2], values.shape[3]) if values.ndim == 4 else (1, 1)
    return Signal(values, torch.arange(first, last, device=values.device), size, None, None)


def convolution(signal: Signal, weight: Tensor) -> Signal:
    """Apply the transposed 3×3 filters: Σ over offsets d of y[i − d]·weight[d].

    Windows grow by one pixel on every side, unless the map is no larger than that.
    """
    signal = _whole_unless_smaller(signal)
    turned = weight.flip(2, 3)
    # A window grows by all its entries reach; a whole map keeps its size.
    padding = 1 if signal.corners is None else 2
    if signal.maps is None:
        turned = turned.transpose(0, 1).contiguous(memory_format=torch.channels_last)
        values = F.conv2d(signal.values, turned, padding=padding)
    else:
        # Only the filters' column of the one nonzero map takes part: sums of 9 terms.
        columns = turned[signal.maps].flatten(2).transpose(1, 2)
        neighbours = F.unfold(signal.values, 3, padding=padding).transpose(1, 2)
        height, width = (side + 2 * padding - 2 for side in signal.values.shape[2:])
        values = torch.bmm(neighbours, columns).unflatten(1, (height, width)).permute(0, 3, 1, 2)
    if signal.corners is None:
        return replace(signal, values=values, maps=None)
    corners = signal.corners - 1
    return replace(signal, values=windows.clear_outside(values, corners, signal.size), maps=None, corners=corners)


def unpool(signal: Signal, switches: Tensor, size: tuple[int, int]) -> Signal:
    """Put each value where the maximum came from.

    Args:
        signal: at the pool's output.
        switches: `[N, C, h, w]` of all images.
        size: height and width of the pool's input.
    """
    if signal.corners is None:
        chosen = switches[signal.images] if signal.maps is None else switches[signal.images, signal.maps, None]
        return replace(signal, values=max_unpool2d_switches(signal.values, chosen, size), size=size)
    # Where a window overhangs the map, its signal is 0, so any switch will do.
    side = signal.values.shape[-1]
    chosen = windows.cut_clamped(switches, signal.images, signal.maps, signal.corners, side)
    values = max_unpool2d_switches(signal.values, chosen, (2 * side, 2 * side))
    return replace(signal, values=values, size=size, corners=2 * signal.corners)


def matrix(signal: Signal, weight: Tensor) -> Signal:
    """Apply a fully connected layer's transposed `weight`, `[outputs, inputs]`."""
    values = signal.values @ weight if signal.maps is None else signal.values * weight[signal.maps]
    return replace(signal, values=values, maps=None)


def averaging(signal: Signal, size: tuple[int, int]) -> Signal:
    """Apply the adjoint of fc6's input step, which averages maps of `size` to 7×7 and flattens them."""
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
