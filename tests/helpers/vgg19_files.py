"""VGG19 files with torchvision's key names."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastnst.models.vgg19 import VGG19
from fastnst.models.weights import torchvision_key

TORCHVISION_KERNEL = [-0.053474, -0.049257, -0.067942, 0.015314, 0.045068, 0.0021444, 0.036226, 0.019999, 0.019864]


def vgg19_state(last_layer: str = "relu2_1", *, kernel: list[float] | None = TORCHVISION_KERNEL) -> dict[str, Tensor]:
    """A VGG19 under torchvision's key names, with `kernel` as conv1_1's first."""
    net = VGG19(last_layer, generator=torch.Generator().manual_seed(3))
    state = {}
    for name, tensor in net.state_dict().items():
        layer, _, kind = name.partition(".")
        state[f"{torchvision_key(layer)}.{kind}"] = tensor.contiguous().clone()
    if kernel is not None:
        state["features.0.weight"][0, 0] = torch.tensor(kernel).view(3, 3)
    return state


def vgg19_file(folder: Path, state: Any, name: str = "vgg19.pth", **options: Any) -> str:
    path = folder / name
    if path.suffix == ".safetensors":
        save_file(state, path, **options)
    else:
        torch.save(state, path, **options)
    return str(path)
