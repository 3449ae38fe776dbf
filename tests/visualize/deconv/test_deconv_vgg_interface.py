"""Deconvnet of VGG19: recordings, calls, bad arguments, and side effects."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnst.errors import UserError
from fastnst.models.vgg19 import VGG19
from fastnst.visualize.deconv.neurons import Neurons
from fastnst.visualize.deconv.vgg import Deconvnet, Recording


def _images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def net() -> VGG19:
    return VGG19("conv2_2", generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture(scope="module")
def recording(net: VGG19) -> Recording:
    return Deconvnet(net).record(_images(2, 3, 18, 23).double(), ["relu1_2", "pool1", "relu2_1"])


# The forward pass.


def test_record_holds_the_nets_activations(net: VGG19) -> None:
    images = _images(2, 3, 17, 22).double()
    for layers in (["conv1_2", "relu1_2", "conv2_2"], ["pool1"], ["relu2_1", "conv1_1"], net.layers):
        found = Deconvnet(net).record(images, layers)
        expected = net(images, layers)
        assert list(found.activations) == list(expected)
        for name, activations in expected.items():
            assert torch.equal(found.activations[name], activations)
            assert found.activations[name].is_contiguous(memory_format=torch.channels_last)
        assert found.size == (17, 22)


# Calling it.


def test_deconvnet_call_agrees_with_record_and_project(net: VGG19) -> None:
    deconvnet = Deconvnet(net)
    images = _images(2, 3, 18, 23).double()
    recording = deconvnet.record(images, ["relu2_1"])
    strongest = Neurons.strongest(recording.activations["relu2_1"], [0, 0, 0, 1, 1, 1], [7, 0, 99] * 2)
    given: dict[Any, Neurons] = {
        "strongest": strongest,
        "all": Neurons.every_position(strongest.images, strongest.maps),
        (8, 0): Neurons.at(strongest.images, strongest.maps, [(8, 0)] * 6),
    }
    for activation, neurons in given.items():
        projections = deconvnet(images, "relu2_1", [7, 0, 99], activation=activation)
        assert tuple(projections.shape) == (2, 3, 3, 18, 23)
        expected = deconvnet.project(recording, "relu2_1", neurons).reshape(projections.shape)
        assert torch.equal(projections, expected)
        assert projections.any()
    assert torch.equal(deconvnet(images, "relu2_1", [7, 0, 99]), deconvnet(images, "relu2_1", [7, 0, 99]))


def test_project_no_neurons(net: VGG19, recording: Recording) -> None:
    deconvnet, none = Deconvnet(net), Neurons.at([], [], [])
    assert tuple(deconvnet.project(recording, "relu2_1", none).shape) == (0, 3, 18, 23)
    assert tuple(deconvnet.project_patches(recording, "relu2_1", none)[0].shape) == (0, 3, 10, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deconvnet_call_keeps_the_nets_type(dtype: torch.dtype) -> None:
    net = VGG19("conv2_1", generator=torch.Generator().manual_seed(0))
    images = _images(1, 3, 16, 19)
    exact = Deconvnet(net.double())(images.double(), "conv2_1", [1, 2])
    projections = Deconvnet(net.to(dtype))(images.to(dtype), "conv2_1", [1, 2])
    assert projections.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(projections.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


# What stays as it was.


def test_deconvnet_changes_neither_net_nor_inputs_nor_random_state(net: VGG19) -> None:
    images = _images(1, 3, 16, 19).double().requires_grad_()
    before_images = images.detach().clone()
    before_net = {name: tensor.clone() for name, tensor in net.state_dict(keep_vars=True).items()}
    net.train()
    random_state = torch.get_rng_state()
    deconvnet = Deconvnet(net)
    recording = deconvnet.record(images, net.layers)
    kept = {name: tensor.clone() for name, tensor in recording.activations.items()}
    for layer in net.layers:
        neurons = Neurons.strongest(recording.activations[layer], [0], [1])
        results = [deconvnet.project(recording, layer, neurons), deconvnet.project_layer(recording, layer)]
        results += deconvnet.project_patches(recording, layer, neurons)
        assert not any(result.requires_grad for result in results)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in recording.activations.items())
    negative = {"relu2_1": -1 - kept["relu2_1"]}
    deconvnet.project_layer(replace(recording, activations=negative), "relu2_1")
    assert torch.equal(negative["relu2_1"], -1 - kept["relu2_1"])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(images.detach(), before_images)
    assert images.grad is None
    assert net.training
    net.eval()
    for name, tensor in net.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before_net[name])
        assert not tensor.requires_grad
    assert not any(module._forward_hooks or module._backward_hooks for module in net.modules())


# What is refused.

ONE = Neurons.at([0], [0], [(0, 0)])
REFUSED: list[tuple[Callable[[Deconvnet, Recording], object], str]] = [
    (lambda d, r: d.project(r, "conv21", ONE), "no VGG19 layer is named 'conv21'; did you mean 'conv2_1'"),
    (lambda d, r: d.project_layer(r, "relux", batch_size=1), "no VGG19 layer is named 'relux'"),
    (lambda d, _: d.channels("conv3_1"), "layer conv3_1 lies behind conv2_2, where this VGG19 ends; load it up to"),
    (lambda d, r: d.project(r, "conv2_2", ONE), "conv2_2 is not recorded, only relu1_2, pool1, relu2_1; ask record()"),
    (lambda d, r: d.project(r, "pool1", Neurons.at([0], [64], [(0, 0)])), "pool1 has no map 64; its maps are 0 … 63"),
    (lambda d, r: d.project(r, "pool1", Neurons.every_position([0], [-1])), "pool1 has no map -1; its maps are 0 … 63"),
    (lambda d, r: d.project(r, "pool1", Neurons.at([2], [0], [(0, 0)])), "no image 2; its images are 0 … 1"),
    (
        lambda d, r: d.project(r, "relu2_1", Neurons.at([0, 0], [0, 1], [(8, 10), (9, 0)])),
        "relu2_1 has no position (9, 0) in this image; its rows are 0 … 8, its columns 0 … 10",
    ),
    (lambda d, r: d.project_patches(r, "relu2_1", Neurons.at([0], [0], [(0, -1)])), "relu2_1 has no position (0, -1)"),
    (
        lambda d, r: d.project_patches(r, "pool1", Neurons.every_position([0], [0])),
        "these neurons have none; use Neurons",
    ),
    (lambda d, _: d.record(torch.rand(1, 3, 1, 9), ["pool1"]), "an image of 9×1 pixels is too small for pool1"),
    (lambda d, _: d.record(torch.rand(1, 3, 9, 9), []), "no VGG19 layer was given"),
    (lambda d, _: d(torch.rand(1, 3, 9, 9), "relu1_1", [64]), "relu1_1 has no map 64; its maps are 0 … 63"),
    (
        lambda d, _: d(torch.rand(1, 3, 9, 9).double(), "relu1_1", [0], activation="strong"),
        "unknown activation 'strong'; choose strongest, all, or a row and column",
    ),
    (lambda d, _: d(torch.rand(1, 3, 9, 9).double(), "relu1_1", [0], activation=(0, 9)), "no position (0, 9)"),
]


@pytest.mark.parametrize(("act", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_deconvnet_refuses_bad_arguments(
    net: VGG19, recording: Recording, act: Callable[[Deconvnet, Recording], object], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        act(Deconvnet(net), recording)


@pytest.mark.gpu
def test_deconvnet_on_a_gpu_agrees_with_the_cpu() -> None:
    net = VGG19("relu3_2", generator=torch.Generator().manual_seed(0)).double()
    images = _images(2, 3, 61, 70).double()
    expected = {which: Deconvnet(net)(images, "relu3_2", [1, 20], activation=which) for which in ("strongest", "all")}
    net.cuda()
    for which, projections in expected.items():
        actual = Deconvnet(net)(images.cuda(), "relu3_2", [1, 20], activation=which).cpu()
        torch.testing.assert_close(actual, projections, rtol=1e-9, atol=1e-10 * float(projections.abs().max()))
