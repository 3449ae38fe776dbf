"""Transform nets and images that are quick to compute in fp64, for the tests of what looks into such nets."""

from dataclasses import replace

import torch
from torch import Tensor

from fastnst.models.transform_net import ConvLayer, TransformNet, UpLayer
from fastnst.visualize.deconv.transform_recording import TransformRecording
from helpers.random_inputs import images, seeded


def random_values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def random_images(count: int, size: tuple[int, int], seed: int = 1) -> Tensor:
    return images(count, 3, *size, seed=seed, dtype=torch.float64)


def convolutions_of(net: TransformNet) -> dict[str, ConvLayer | UpLayer]:
    return {name: module for name, module in net.named_modules() if isinstance(module, ConvLayer | UpLayer)}


def small_net(architecture: str, norm: str = "instance") -> TransformNet:
    """In fp64, every eighth channel, with scales, shifts and statistics that nothing could take for 1 or 0."""
    net = TransformNet(architecture, norm, generator=seeded(2))
    for seed, (name, layer) in enumerate(convolutions_of(net).items()):
        first, second = (side if side == 3 else side // 8 for side in layer.weight.shape[:2])
        weight = (8**0.5 * layer.weight.detach()[:first, :second]).contiguous(memory_format=torch.channels_last)
        layer.weight = torch.nn.Parameter(weight)
        channels = second if name.startswith("up") and not layer.nearest else first
        random = [torch.randn(channels, generator=seeded(10 * seed + kind)) for kind in range(4)]
        if layer.norm is None:
            layer.bias = torch.nn.Parameter(random[0])
        else:
            layer.scale, layer.shift = torch.nn.Parameter(1 + 0.3 * random[0]), torch.nn.Parameter(0.3 * random[1])
        if layer.norm == "batch":
            layer.running_mean, layer.running_var = random[2], 0.5 + random[3].square()
    return net.double()


def with_activations(recording: TransformRecording, layer: str, activations: Tensor) -> TransformRecording:
    return replace(recording, activations={layer: activations})
