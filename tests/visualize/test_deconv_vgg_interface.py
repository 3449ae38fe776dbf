"""The deconvnet as its callers see it: what is recorded, how it is called, what is refused, what stays as it was."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnst.errors import UserError
from fastnst.images import read_image, to_tensor
from fastnst.models.vgg19 import VGG19
from fastnst.models.weights import load_vgg19
from fastnst.visualize.deconv import transposed
from fastnst.visualize.deconv.neurons import Seeds
from fastnst.visualize.deconv.receptive_field import receptive_field
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


def test_a_recording_holds_what_the_net_gives(net: VGG19) -> None:
    images = _images(2, 3, 17, 22).double()
    for layers in (["conv1_2", "relu1_2", "conv2_2"], ["pool1"], ["relu2_1", "conv1_1"], net.layers):
        found = Deconvnet(net).record(images, layers)
        expected = net(images, layers)
        assert list(found.activations) == list(expected)
        for name, activations in expected.items():
            assert torch.equal(found.activations[name], activations)
            assert found.activations[name].is_contiguous(memory_format=torch.channels_last)
        assert found.size == (17, 22)


def test_switches_and_sizes_are_kept_of_each_pool_that_is_passed(net: VGG19) -> None:
    shallow = Deconvnet(net).record(_images(1, 3, 17, 22).double(), ["relu1_2"])
    assert (shallow.switches, shallow.input_sizes) == ({}, {})
    found = Deconvnet(net).record(_images(1, 3, 17, 22).double(), ["pool1"])
    assert found.input_sizes == {"pool1": (17, 22)}
    assert found.switches["pool1"].dtype == torch.uint8
    assert tuple(found.switches["pool1"].shape) == (1, 64, 8, 11)


def test_many_maps_cost_one_forward_pass(net: VGG19) -> None:
    calls: list[str] = []
    hooks = [module.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, module in _layers(net)]
    try:
        projections = Deconvnet(net)(_images(1, 3, 16, 16).double(), "relu2_1", range(40), seed="all")
    finally:
        for hook in hooks:
            hook.remove()
    assert tuple(projections.shape) == (1, 40, 3, 16, 16)
    assert sorted(calls) == sorted(set(calls))
    assert "relu2_1" in calls


def _layers(net: VGG19) -> list[tuple[str, torch.nn.Module]]:
    return [(name, net.get_submodule(name)) for name in net.layers]


# Calling it.


def test_a_call_does_image_by_image_and_map_by_map_what_its_parts_do(net: VGG19) -> None:
    deconvnet = Deconvnet(net)
    images = _images(2, 3, 18, 23).double()
    recording = deconvnet.record(images, ["relu2_1"])
    strongest = Seeds.strongest(recording.activations["relu2_1"], [0, 0, 0, 1, 1, 1], [7, 0, 99] * 2)
    given: dict[Any, Seeds] = {
        "strongest": strongest,
        "all": Seeds.every_position(strongest.images, strongest.maps),
        (8, 0): Seeds.at(strongest.images, strongest.maps, [(8, 0)] * 6),
    }
    for seed, seeds in given.items():
        projections = deconvnet(images, "relu2_1", [7, 0, 99], seed=seed)
        assert tuple(projections.shape) == (2, 3, 3, 18, 23)
        expected = deconvnet.project(recording, "relu2_1", seeds).reshape(projections.shape)
        assert torch.equal(projections, expected)
        assert projections.any()
    assert torch.equal(deconvnet(images, "relu2_1", [7, 0, 99]), deconvnet(images, "relu2_1", [7, 0, 99]))


def test_a_patch_lies_where_it_says(net: VGG19, recording: Recording) -> None:
    seeds = Seeds.at([0, 1, 1], [3, 4, 5], [(0, 0), (8, 10), (4, 5)])
    cropped, corners = Deconvnet(net).project_patches(recording, "relu2_1", seeds)
    field = receptive_field("relu2_1")
    assert tuple(cropped.shape) == (3, 3, field.size, field.size)
    assert corners.dtype == torch.int64
    assert corners.tolist() == [[-4, -4], [12, 16], [4, 6]]
    # The first overhangs the image by four pixels above and on the left, the second below and on the right.
    assert not cropped[0, :, :4].any()
    assert not cropped[0, :, :, :4].any()
    assert not cropped[1, :, 6:].any()
    assert not cropped[1, :, :, 7:].any()


def test_a_seed_is_carried_in_a_window_no_larger_than_what_it_sees(net: VGG19, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []

    def watched(signal: transposed.Signal, weight: Tensor) -> transposed.Signal:
        result = convolution(signal, weight)
        sizes.append(tuple(result.values.shape[2:]))
        return result

    convolution = transposed.convolution
    monkeypatch.setattr(transposed, "convolution", watched)
    deconvnet = Deconvnet(net)
    deconvnet(_images(1, 3, 30, 40).double(), "conv2_1", [5])
    assert sizes == [(3, 3), (8, 8), (10, 10)]
    sizes.clear()
    # 3×3 is still smaller than the pool's 4×5; the next window, 8×8, is not smaller than the image of 8×7.
    deconvnet(_images(1, 3, 8, 7).double(), "conv2_1", [5])
    assert sizes == [(3, 3), (8, 7), (8, 7)]


def test_no_seeds_give_no_projections(net: VGG19, recording: Recording) -> None:
    deconvnet, none = Deconvnet(net), Seeds.at([], [], [])
    assert tuple(deconvnet.project(recording, "relu2_1", none).shape) == (0, 3, 18, 23)
    assert tuple(deconvnet.project_patches(recording, "relu2_1", none)[0].shape) == (0, 3, 10, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_have_the_nets_type(dtype: torch.dtype) -> None:
    net = VGG19("conv2_1", generator=torch.Generator().manual_seed(0))
    images = _images(1, 3, 16, 19)
    exact = Deconvnet(net.double())(images.double(), "conv2_1", [1, 2])
    projections = Deconvnet(net.to(dtype))(images.to(dtype), "conv2_1", [1, 2])
    assert projections.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(projections.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("layer", ["conv1_2", "pool1", "relu2_1"])
def test_channels(net: VGG19, layer: str) -> None:
    assert Deconvnet(net).channels(layer) == (128 if layer == "relu2_1" else 64)


# What stays as it was.


def test_net_images_recording_and_random_numbers_stay_as_they_were(net: VGG19) -> None:
    images = _images(1, 3, 16, 19).double().requires_grad_()
    before_images = images.detach().clone()
    before_net = {name: tensor.clone() for name, tensor in net.state_dict(keep_vars=True).items()}
    net.train()
    random_state = torch.get_rng_state()
    deconvnet = Deconvnet(net)
    recording = deconvnet.record(images, net.layers)
    kept = {name: tensor.clone() for name, tensor in recording.activations.items()}
    for layer in net.layers:
        seeds = Seeds.strongest(recording.activations[layer], [0], [1])
        results = [deconvnet.project(recording, layer, seeds), deconvnet.project_layer(recording, layer)]
        results += deconvnet.project_patches(recording, layer, seeds)
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

ONE = Seeds.at([0], [0], [(0, 0)])
REFUSED: list[tuple[Callable[[Deconvnet, Recording], object], str]] = [
    (lambda d, r: d.project(r, "conv21", ONE), "no VGG19 layer is named 'conv21'; did you mean 'conv2_1'"),
    (lambda d, r: d.project_layer(r, "relux", batch_size=1), "no VGG19 layer is named 'relux'"),
    (lambda d, _: d.channels("conv3_1"), "layer conv3_1 lies behind conv2_2, where this VGG19 ends; load it up to"),
    (lambda d, r: d.project(r, "fc6", ONE), "layer fc6 lies behind conv2_2"),
    (lambda d, r: d.project(r, "conv2_2", ONE), "conv2_2 is not recorded, only relu1_2, pool1, relu2_1; ask record()"),
    (lambda d, r: d.project_layer(r, "conv1_1"), "conv1_1 is not recorded"),
    (
        lambda d, r: d.project(r, "relu2_1", Seeds.at([0], [128], [(0, 0)])),
        "relu2_1 has no map 128; its maps are 0 … 127",
    ),
    (lambda d, r: d.project(r, "pool1", Seeds.every_position([0], [-1])), "pool1 has no map -1; its maps are 0 … 63"),
    (
        lambda d, r: d.project(r, "relu2_1", Seeds.at([2], [0], [(0, 0)])),
        "there is no image 2 in the recording; its images are 0 … 1",
    ),
    (
        lambda d, r: d.project(r, "relu2_1", Seeds.at([0, 0], [0, 1], [(8, 10), (9, 0)])),
        "relu2_1 has no position (9, 0) in this image; its rows are 0 … 8, its columns 0 … 10",
    ),
    (lambda d, r: d.project_patches(r, "relu2_1", Seeds.at([0], [0], [(0, -1)])), "relu2_1 has no position (0, -1)"),
    (lambda d, r: d.project_patches(r, "relu2_1", Seeds.every_position([0], [0])), "these seeds have none; use Seeds"),
    (lambda d, _: d.record(torch.rand(1, 3, 1, 9), ["pool1"]), "an image of 9×1 pixels is too small for pool1"),
    (lambda d, _: d.record(torch.rand(1, 3, 9, 9), []), "no VGG19 layer is asked for"),
    (lambda d, _: d.record(torch.rand(1, 3, 9, 9), ["relu2_2"]), "layer relu2_2 lies behind conv2_2"),
    (lambda d, _: d(torch.rand(1, 3, 9, 9), "relu1_1", [64]), "relu1_1 has no map 64; its maps are 0 … 63"),
    (lambda d, _: d(torch.rand(1, 3, 9, 9), "relu11", [0]), "did you mean 'relu1_1'"),
    (
        lambda d, _: d(torch.rand(1, 3, 9, 9).double(), "relu1_1", [0], seed="strong"),
        "unknown seed 'strong'; choose strongest, all, or a row and column",
    ),
    (lambda d, _: d(torch.rand(1, 3, 9, 9).double(), "relu1_1", [0], seed=(0, 9)), "no position (0, 9)"),
]


@pytest.mark.parametrize(("act", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_cannot_be_projected_is_refused(
    net: VGG19, recording: Recording, act: Callable[[Deconvnet, Recording], object], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        act(Deconvnet(net), recording)


# The real thing.


def test_real_weights_on_a_photo(weights: Path, content: Path) -> None:
    file = str(weights / "vgg19_caffe_conv1_1-conv3_4.pth")
    net = load_vgg19(file, last_layer="relu3_4")
    image = to_tensor(read_image(content / "content_chicago.jpg")[100:228, 100:260])
    deconvnet = Deconvnet(net)
    recording = deconvnet.record(image, ["relu3_4"])
    activations = recording.activations["relu3_4"]
    maps = activations.amax((0, 2, 3)).topk(8).indices
    seeds = Seeds.strongest(activations, [0] * 8, maps)
    projections = deconvnet.project(recording, "relu3_4", seeds)
    for index in range(8):
        assert seeds.positions is not None
        alone = torch.zeros_like(activations)
        place = (0, int(maps[index]), *seeds.positions[index].tolist())
        alone[place] = activations[place]
        by_all = deconvnet.project_layer(replace(recording, activations={"relu3_4": alone}), "relu3_4")[0]
        scale = float(by_all.abs().max())
        assert scale > 0
        torch.testing.assert_close(projections[index], by_all, rtol=1e-4, atol=1e-5 * scale)
        field = receptive_field("relu3_4")
        top, left = (place[axis] * field.jump + field.start for axis in (2, 3))
        rows, columns = by_all.abs().amax(0).nonzero().T
        assert top <= rows.min() <= rows.max() < top + field.size
        assert left <= columns.min() <= columns.max() < left + field.size


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    net = VGG19("relu3_2", generator=torch.Generator().manual_seed(0)).double()
    images = _images(2, 3, 61, 70).double()
    expected = {seed: Deconvnet(net)(images, "relu3_2", [1, 20], seed=seed) for seed in ("strongest", "all")}
    net.cuda()
    for seed, projections in expected.items():
        actual = Deconvnet(net)(images.cuda(), "relu3_2", [1, 20], seed=seed).cpu()
        torch.testing.assert_close(actual, projections, rtol=1e-9, atol=1e-10 * float(projections.abs().max()))
