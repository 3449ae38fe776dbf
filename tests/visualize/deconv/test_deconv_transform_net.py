"""The transform net's deconvnet, up and down: as operators, against autograd, and by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst.models import transform_net
from fastnst.models.transform_net import ARCHITECTURES, LAYER_NAMES, NORMS, TransformNet
from fastnst.visualize.deconv.neurons import Neurons
from fastnst.visualize.deconv.transform_net import TransformDeconvnet
from helpers.tiny_transform_nets import random_images, small_net, with_activations

# Together: even and odd sides at conv2 and at conv3, in all combinations.
SIZES = [(16, 21), (19, 18)]


def _backwards(x: Tensor, value: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """`value`, whose gradient autograd sends on to x as `rule` of it."""
    y = x + (value - x).detach()
    y.register_hook(rule)
    return y


def _open_relu(x: Tensor) -> Tensor:
    return _backwards(x, x.relu(), torch.clone)


def _deconv_relu(x: Tensor) -> Tensor:
    return _backwards(x, x.relu(), torch.relu)


def _renorm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Instance norm without shift, of values and of gradients alike."""

    def standardised(values: Tensor, eps: float = 0.0) -> Tensor:
        variance, mean = torch.var_mean(values, (2, 3), correction=0, keepdim=True)
        return (values - mean) / (variance + eps).sqrt() * scale[:, None, None]

    return _backwards(x, standardised(x, eps), standardised)


def _plainly(
    net: TransformNet, x: Tensor, relu: Callable[[Tensor], Tensor] = F.relu, *, renormalise: bool = False
) -> dict[str, Tensor]:
    """Every layer's activations out of PyTorch's own functions, the norms' statistics detached from the graph."""
    johnson, hwalsuklee = net.architecture == "johnson", net.architecture == "hwalsuklee"
    size = x.shape[2:]

    def conv(layer: Any, y: Tensor, stride: int = 1, *, valid: bool = False) -> Tensor:
        half = layer.weight.shape[-1] // 2
        if johnson:
            y = F.pad(y, (half,) * 4, mode="reflect")
        elif stride == 2:
            y = F.pad(y, [pad for side in (y.shape[3], y.shape[2]) for pad in ((1, 1) if side % 2 else (0, 1))])
        elif not valid:
            y = F.pad(y, (half,) * 4)
        return F.conv2d(y, layer.weight, layer.bias, stride)

    def norm(layer: Any, y: Tensor) -> Tensor:
        if layer.norm is None:
            return y
        if renormalise:
            return _renorm(y, layer.scale, layer.eps) + layer.shift[:, None, None]
        if layer.norm == "batch":
            mean, variance = layer.running_mean[:, None, None], layer.running_var[:, None, None]
        else:
            mean = y.detach().mean((2, 3), keepdim=True)
            variance = y.detach().var((2, 3), correction=0, keepdim=True)
        return (y - mean) / (variance + layer.eps).sqrt() * layer.scale[:, None, None] + layer.shift[:, None, None]

    def up(layer: Any, y: Tensor) -> Tensor:
        if johnson:
            return conv(layer, F.interpolate(y, scale_factor=2, mode="nearest"))
        return F.conv_transpose2d(y, layer.weight, stride=2)[:, :, :-1, :-1]

    activations: dict[str, Tensor] = {}
    if hwalsuklee:
        rows, columns = (torch.from_numpy(np.pad(np.arange(side), 40, mode="reflect")) for side in size)
        x = x[:, :, rows[:, None], columns]
    x = x * 255 if johnson else x
    for name in LAYER_NAMES:
        layer: Any = net.get_submodule(name)
        if name.startswith("conv"):
            x = relu(norm(layer, conv(layer, x, 1 if name == "conv1" else 2)))
        elif name.startswith("res"):
            y = relu(norm(layer.conv1, conv(layer.conv1, x, valid=hwalsuklee)))
            y = norm(layer.conv2, conv(layer.conv2, y, valid=hwalsuklee))
            x = y + (x[:, :, 2:-2, 2:-2] if hwalsuklee else x)
        elif name.startswith("up"):
            x = relu(norm(layer, up(layer, x)))
        else:
            x = norm(layer, conv(layer, x))
            x = x[:, :, : size[0], : size[1]] if johnson else x[:, :, -size[0] :, -size[1] :]
        activations[name] = x
    return activations


# The way up.


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_record_activations_agree_with_plain_pytorch(architecture: str, norm: str, size: tuple[int, int]) -> None:
    net = small_net(architecture, norm).eval()
    images = random_images(2, size)
    recording = TransformDeconvnet(net).record(images, LAYER_NAMES)
    assert list(recording.activations) == list(LAYER_NAMES)
    for layer, expected in _plainly(net, images).items():
        torch.testing.assert_close(recording.activations[layer], expected, rtol=1e-9, atol=1e-9)
    out = recording.activations["out"]
    with torch.no_grad():
        scaled = {"hwalsuklee": 0.5 * out.tanh() + 0.5, "lengstrom": (150.0 / 255.0) * out.tanh() + 0.5}
        output = scaled.get(architecture, (1.0 / 255.0) * out)
        assert torch.equal(output, net(images))


def test_record_activations_do_not_depend_on_where_upsampling_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_net("johnson")
    images = random_images(1, (18, 21))
    expected = TransformDeconvnet(net).record(images, LAYER_NAMES).activations
    # The CPU takes the way that a GPU takes through nearest-neighbour layers.
    monkeypatch.setattr(transform_net, "_upsamples_in_norm", lambda _: True)
    actual = TransformDeconvnet(net).record(images, LAYER_NAMES).activations
    for layer in LAYER_NAMES:
        torch.testing.assert_close(actual[layer], expected[layer], rtol=1e-9, atol=1e-9)
        assert actual[layer].is_contiguous(memory_format=torch.channels_last)


def test_record_keeps_requested_layers_front_to_back() -> None:
    recording = TransformDeconvnet(small_net("lengstrom")).record(random_images(1, (16, 16)), ["up1", "conv2", "res1"])
    assert list(recording.activations) == ["conv2", "res1", "up1"]


# The way down.


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("rule", "norm"), [("deconvnet", "batch"), ("open", "instance"), ("renorm", "instance")])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "johnson as on a GPU"])
def test_project_layer_agrees_with_autograd(
    architecture: str, rule: str, norm: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd, with the rule as the backward of ReLUs and norms; `open` gives the exact adjoint."""
    architecture, *on_a_gpu = architecture.split(maxsplit=1)
    if on_a_gpu:
        monkeypatch.setattr(transform_net, "_upsamples_in_norm", lambda _: True)
    net = small_net(architecture, norm).eval()
    images = random_images(2, size).requires_grad_()
    deconvnet = TransformDeconvnet(net)
    recording = deconvnet.record(images, LAYER_NAMES)
    relu = _open_relu if rule == "open" else _deconv_relu
    for layer, activations in _plainly(net, images, relu, renormalise=rule == "renorm").items():
        signal = recording.activations[layer]
        expected = torch.autograd.grad(activations, images, signal, retain_graph=True)[0]
        actual = deconvnet.project_layer(recording, layer, rectify=rule != "open", renormalise=rule == "renorm")
        assert not actual.requires_grad
        largest = float(expected.abs().max())
        assert largest > 0
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9 * largest)


def test_project_from_the_first_layer_by_hand() -> None:
    net = small_net("lengstrom")
    deconvnet = TransformDeconvnet(net)
    recording = deconvnet.record(random_images(1, (16, 17)), ["conv1"])
    activations = recording.activations["conv1"]
    neurons = Neurons.at([0], [2], [(5, 7)])
    around = F.conv2d(random_images(1, (16, 17)), net.conv1.weight, padding=4)[0, 2]
    gain = net.conv1.scale[2] / (around.var(correction=0) + 1e-3).sqrt()
    expected = torch.zeros(1, 3, 16, 17, dtype=torch.float64)
    # The filter, laid around the position, with the activation's value; its fourth row to the left fits in, too.
    expected[0, :, 1:10, 3:12] = net.conv1.weight[2] * gain * activations[0, 2, 5, 7]
    assert float(activations[0, 2, 5, 7]) != 0
    torch.testing.assert_close(deconvnet.project(recording, "conv1", neurons), expected.detach())


@pytest.mark.parametrize(
    ("architecture", "layer"),
    [("hwalsuklee", "res3"), ("lengstrom", "conv2"), ("lengstrom", "out"), ("johnson", "up1")],
)
def test_project_treats_neurons_independently(architecture: str, layer: str) -> None:
    deconvnet = TransformDeconvnet(small_net(architecture))
    recording = deconvnet.record(random_images(3, (17, 18)), [layer])
    activations = recording.activations[layer]
    images, maps = [2, 0, 0, 2, 1], [1, 2, 0, 1, 0]
    strongest = Neurons.strongest(activations, images, maps)
    for neurons in (Neurons.every_position(images, maps), strongest):
        projections = deconvnet.project(recording, layer, neurons, batch_size=2)
        assert projections.shape == (5, 3, 17, 18)
        assert float(projections[0].abs().max()) > 0
        for index, (image, channel) in enumerate(zip(images, maps, strict=True)):
            alone = torch.zeros_like(activations)
            where = slice(None) if neurons.positions is None else tuple(neurons.positions[index].tolist())
            alone[image, channel][where] = activations[image, channel][where]
            expected = deconvnet.project_layer(with_activations(recording, layer, alone), layer)[image]
            torch.testing.assert_close(projections[index], expected, rtol=1e-9, atol=1e-12)


def test_project_layer_does_not_depend_on_batch_size() -> None:
    deconvnet = TransformDeconvnet(small_net("johnson"))
    recording = deconvnet.record(random_images(3, (16, 19)), ["up2"])
    for options in ({}, {"renormalise": True}):
        together = deconvnet.project_layer(recording, "up2", **options)
        assert together.shape == (3, 3, 16, 19)
        torch.testing.assert_close(deconvnet.project_layer(recording, "up2", batch_size=2, **options), together)


def test_project_of_no_neurons_is_empty_and_of_zeros_is_zero() -> None:
    deconvnet = TransformDeconvnet(small_net("lengstrom"))
    recording = deconvnet.record(random_images(1, (16, 18)), ["res4"])
    assert deconvnet.project(recording, "res4", Neurons.every_position([], [])).shape == (0, 3, 16, 18)
    silent = with_activations(recording, "res4", torch.zeros_like(recording.activations["res4"]))
    for renormalise in (False, True):
        projection = deconvnet.project_layer(silent, "res4", renormalise=renormalise)
        assert torch.equal(projection, torch.zeros_like(projection))
