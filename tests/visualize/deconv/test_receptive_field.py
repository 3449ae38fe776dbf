"""Receptive fields: the known sizes, and what a gradient through every layer reaches."""

import pytest
import torch
import torch.nn.functional as F

from fastnst.errors import UserError
from fastnst.models.vgg19 import LAYERS
from fastnst.visualize.deconv.receptive_field import receptive_field

SIZES = {
    **{"conv1_1": 3, "conv1_2": 5, "pool1": 6, "conv2_2": 14, "pool2": 16, "conv3_4": 48},
    **{"pool3": 52, "conv4_4": 116, "pool4": 124, "conv5_4": 252, "pool5": 268},
}


@pytest.mark.parametrize("layer", SIZES)
def test_receptive_field_sizes(layer: str) -> None:
    field = receptive_field(layer)
    assert field.size == SIZES[layer]
    assert field.jump == 2 ** sum(name.startswith("pool") for name in LAYERS[: LAYERS.index(layer) + 1])
    if layer.startswith("conv"):
        assert receptive_field(layer.replace("conv", "relu")) == field


@pytest.mark.parametrize("layer", ["conv1_1", "pool1", "relu2_2", "conv3_4", "pool4", "conv5_4"])
def test_receptive_field_is_where_a_gradient_reaches(layer: str) -> None:
    """One channel, filters of ones, averages instead of maxima: no gradient is lost on the way."""
    image = torch.ones(1, 1, 288, 320, dtype=torch.float64, requires_grad=True)
    x: torch.Tensor = image
    for name in LAYERS[: LAYERS.index(layer) + 1]:
        if name.startswith("conv"):
            x = F.conv2d(x, torch.ones(1, 1, 3, 3, dtype=x.dtype), padding=1)
        elif name.startswith("pool"):
            x = F.avg_pool2d(x, 2)
    field = receptive_field(layer)
    for position in ((0, 0), (x.shape[2] // 2, x.shape[3] // 2), (x.shape[2] - 1, x.shape[3] - 1)):
        (seen,) = torch.autograd.grad(x[0, 0, position[0], position[1]], image, retain_graph=True)
        expected = torch.zeros_like(image)
        top, left = (field.start + place * field.jump for place in position)
        expected[..., max(top, 0) : top + field.size, max(left, 0) : left + field.size] = 1
        assert torch.equal((seen != 0).to(expected.dtype), expected)


def test_receptive_field_refuses_fully_connected_and_unknown_layers() -> None:
    with pytest.raises(UserError, match=r"fc6 depends on the whole image .*; choose a layer up to pool5"):
        receptive_field("fc6")
    with pytest.raises(UserError, match="no VGG19 layer is named 'conv34'; did you mean 'conv3_4'"):
        receptive_field("conv34")
