"""The transform net's deconvnet in use: what it leaves alone, what it refuses, and a published network."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnst.errors import UserError
from fastnst.images import read_image, to_tensor
from fastnst.models.pretrained import load_lengstrom_npz
from fastnst.models.transform_net import LAYER_NAMES, NORMS, TransformNet
from fastnst.visualize.deconv.neurons import Neurons
from fastnst.visualize.deconv.transform_net import TransformDeconvnet
from fastnst.visualize.deconv.transform_recording import TransformRecording
from helpers.random_inputs import seeded
from helpers.tiny_transform_nets import random_images, small_net


def _state(net: TransformNet) -> list[Any]:
    modules = list(net.modules())
    return [
        [module.training for module in modules],
        [sorted(vars(module)) for module in modules],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
        [parameter.requires_grad for parameter in net.parameters()],
    ]


@pytest.mark.parametrize("norm", NORMS)
def test_transform_deconvnet_changes_neither_net_nor_inputs_nor_random_state(norm: str) -> None:
    net = small_net("johnson", norm)
    net.res2.eval()
    net.up1.requires_grad_(False)
    before, tensors = _state(net), {name: value.clone() for name, value in net.state_dict().items()}
    images = random_images(2, (16, 17))
    copy = images.clone()
    random = torch.get_rng_state()
    deconvnet = TransformDeconvnet(net)
    recording = deconvnet.record(images, LAYER_NAMES)
    activations = {layer: values.clone() for layer, values in recording.activations.items()}
    for layer in LAYER_NAMES:
        deconvnet.project(recording, layer, Neurons.strongest(recording.activations[layer], [1], [0]))
        deconvnet.project_layer(recording, layer)
        deconvnet.project_layer(recording, layer, renormalise=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(images, copy)
    assert all(torch.equal(recording.activations[layer], values) for layer, values in activations.items())
    assert _state(net) == before
    assert all(torch.equal(value, tensors[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_record_restores_the_net_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_net("lengstrom")
    before = _state(net)

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(type(net.up1), "forward", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        TransformDeconvnet(net).record(random_images(1, (16, 16)), ["conv1"])
    assert _state(net) == before


def test_transform_deconvnet_in_inference_mode_and_under_autocast() -> None:
    net = TransformNet("hwalsuklee", generator=seeded(0))
    deconvnet = TransformDeconvnet(net)
    images = random_images(1, (16, 16))
    expected = deconvnet.project_layer(deconvnet.record(images, ["res1"]), "res1")
    assert expected.dtype == torch.float32
    with torch.no_grad():
        output = net(images.float())
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        recording = deconvnet.record(images, ["res1", "out"])
    with torch.inference_mode():
        assert torch.equal(0.5 * recording.activations["out"].tanh() + 0.5, output)
        torch.testing.assert_close(deconvnet.project_layer(recording, "res1"), expected)


# Bad input.


REFUSED: list[tuple[Callable[[TransformDeconvnet, TransformRecording], object], str]] = [
    (lambda d, _: d.record(random_images(1, (16, 16)), ["rse1"]), "no layer 'rse1'; did you mean 'res1'"),
    (lambda d, _: d.record(random_images(1, (16, 16)), ["zzz"]), "no layer 'zzz'; the layers are conv1, conv2"),
    (lambda d, _: d.record(random_images(1, (16, 16)), []), "no layer was given; name at least one of conv1"),
    (lambda d, r: d.project_layer(r, "up1"), "up1 is not recorded, only conv1, conv3"),
    (lambda d, r: d.project(r, "upp1", Neurons.every_position([0], [0])), "did you mean 'up1'"),
    (lambda d, r: d.project(r, "conv3", Neurons.every_position([0], [16])), "conv3 has no map 16; its maps are 0 … 15"),
    (lambda d, r: d.project(r, "conv3", Neurons.every_position([2], [0])), "no image 2; its images are 0 … 1"),
    (
        lambda d, r: d.project(r, "conv3", Neurons.at([0], [0], [(4, 0)])),
        "no position (4, 0) in this image; its rows are 0 … 3, its columns 0 … 4",
    ),
    (lambda d, _: d.record(random_images(1, (15, 40)), ["conv1"]), "sides of 16 pixels or more"),
    (lambda d, _: d.record(random_images(1, (16, 16))[0], ["conv1"]), "sides of 16 pixels or more"),
    (lambda d, _: d.record(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["conv1"]), "divide by 255"),
]


def test_transform_deconvnet_refuses_bad_arguments() -> None:
    deconvnet = TransformDeconvnet(small_net("lengstrom"))
    recording = deconvnet.record(random_images(2, (16, 20)), ["conv1", "conv3"])
    for act, message in REFUSED:
        with pytest.raises(UserError, match=re.escape(message)):
            act(deconvnet, recording)


# A real network.


def _spread(projection: Tensor) -> float:
    """The share of the image that the projection's energy fills: 1 where it is the same everywhere."""
    energy = projection.square().sum(1)
    return float(energy.mean() ** 2 / energy.square().mean())


def test_project_layer_renormalised_keeps_shapes_of_a_published_net(weights: Path, content: Path) -> None:
    net = load_lengstrom_npz(weights / "transform_lengstrom_udnie.npz")
    deconvnet = TransformDeconvnet(net)
    photo = to_tensor(read_image(content / "content_stata.jpg"))
    recording = deconvnet.record(F.interpolate(photo, (128, 128), mode="area"), ["res5", "up1"])
    for layer in ("res5", "up1"):
        assert _spread(deconvnet.project_layer(recording, layer)) < 0.1
        assert _spread(deconvnet.project_layer(recording, layer, renormalise=True)) > 0.2
