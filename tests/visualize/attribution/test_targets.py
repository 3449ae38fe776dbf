"""Targets of saliency and occlusion: how they are written, and the number that they stand for."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from fastnst.errors import DataError, UserError
from fastnst.models.vgg19 import LAYERS, VGG19
from fastnst.visualize.attribution.occlusion import occlusion
from fastnst.visualize.attribution.saliency import saliency
from fastnst.visualize.attribution.targets import Target, _classes, parse_target, score
from fastnst.visualize.deconv.transform_net import TransformDeconvnet
from fastnst.visualize.deconv.vgg import Deconvnet
from helpers.tiny_transform_nets import small_net


@pytest.fixture(scope="module")
def net() -> VGG19:
    return VGG19("relu2_1", generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture(scope="module")
def classifier() -> VGG19:
    """All layers of VGG19, the fully connected ones narrow: with their 4096 units they would hold 124 M weights."""
    generator = torch.Generator().manual_seed(1)
    net = VGG19("pool5", generator=generator)
    widths = {"fc6": (512, 12), "fc7": (12, 12), "fc8": (12, 1000)}
    for name in LAYERS[LAYERS.index("fc6") :]:
        if name.startswith("relu"):
            net.add_module(name, type(net.relu1_1)())
            continue
        inputs, outputs = widths[name]
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
        with torch.no_grad():
            linear.weight.normal_(0.0, (2 / inputs) ** 0.5, generator=generator)
            linear.bias.zero_()
        averaged = (nn.AdaptiveAvgPool2d(1), nn.Flatten()) if name == "fc6" else ()
        net.add_module(name, nn.Sequential(*averaged, linear))
    net.layers, net.last_layer = LAYERS, LAYERS[-1]
    return net.requires_grad_(False).eval()


def test_classes_are_ilsvrc2012s_in_its_order() -> None:
    classes = _classes()
    synsets = [names[0] for names in classes]
    assert len(classes) == 1000
    assert synsets == sorted(set(synsets))
    assert all(len(names) > 1 and all(names) for names in classes)
    # Numbers that are printed in many places.
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 388: "giant panda", 999: "toilet tissue"}
    assert {number: classes[number][1] for number in known} == known


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("class:999", 999),
        (" CLASS : +012 ", 12),
        ("class:Golden_Retriever", 207),
        ("class:  goldenRETRIEVER ", 207),
        ("class:n02099601", 207),
        ("class:Tinca  tinca", 0),
        ("class:jack-o'-lantern", 607),
        ("class:tank suit", 639),
    ],
)
def test_parse_target_class_by_number_or_name(text: str, number: int) -> None:
    target = parse_target(text)
    assert (target.layer, target.map) == ("fc8", number)
    assert target.name == f"{_classes()[number][1]} (class {number})"


def test_parse_target_finds_every_class_name_or_lists_ambiguous_ones() -> None:
    owners: dict[str, set[int]] = {}
    for number, names in enumerate(_classes()):
        for name in names:
            owners.setdefault(name.lower(), set()).add(number)
    assert sum(len(numbers) > 1 for numbers in owners.values()) == 19
    for name, numbers in owners.items():
        text = f"class:{name.upper().replace(' ', '_')}"
        if len(numbers) == 1:
            assert {parse_target(text).map} == numbers
        else:
            with pytest.raises(UserError, match="several ImageNet classes") as caught:
                parse_target(text)
            assert all(f"class:{number} (" in str(caught.value) for number in numbers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class:crane", "several ImageNet classes are named 'crane'.* class:134 .*class:517 "),
        ("class:Maillot", r"class:638 \(maillot\), class:639 \(maillot; tank suit\)"),
        ("class:goldfihs", r"named 'goldfihs'; did you mean 'goldfish' \(class:1\)"),
        ("class:shark", r"'tiger shark' \(class:3\), 'hammerhead shark' \(class:4\)"),
        ("class:catt", r"'tabby cat' \(class:281\), 'tiger cat' \(class:282\), .* or \d+ more\?"),
        ("class:siamse cat", r"did you mean 'Siamese cat' \(class:284\)\?"),
        ("class:gold retreiver", r"'golden retriever' \(class:207\)"),
        ("class:qqqqq", "give another name, or a number 0 … 999"),
        ("class:_", "no ImageNet class is named '_'; give another"),
        ("class:1000", "no class 1000; ImageNet's are 0 … 999"),
        ("class:-1", "no class -1"),
        ("class:" + "9" * 5000, "no class 9999"),
        ("relu3_5:1", "no VGG19 layer is named 'relu3_5'; did you mean 'relu3_4'"),
        ("relu3_4:256", "relu3_4 has no map 256; its maps are 0 … 255"),
        ("pool2:-1", "pool2 has no map -1; its maps are 0 … 127"),
        ("relu3_4:strong", "names no map; the maps of relu3_4 are 0 … 255"),
        ("relu3_4:" + "9" * 5000, "names no map"),
        ("relu7:4096", "relu7 has no map 4096; its maps are 0 … 4095"),
        ("golden retriever", r"write class:N \(0 … 999\), class:NAME or layer:map"),
        ("class:", "is not understood"),
        (":5", "is not understood"),
        ("", "is not understood"),
    ],
)
def test_parse_target_refuses_bad_targets_with_a_fix(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_target(text)
    assert caught.value.exit_code == 2


def test_parse_target_map() -> None:
    assert parse_target("relu3_4:17") == Target("relu3_4", 17, "relu3_4:17")
    assert parse_target(" pool5 : 0511 ") == Target("pool5", 511, "pool5:511")
    assert parse_target("fc8:999").layer == "fc8"


def test_parse_target_does_not_import_torch() -> None:
    code = (
        "import sys; from fastnst.visualize.attribution.targets import parse_target; parse_target('class:tabby');"
        "parse_target('relu3_4:17');"
        "sys.exit('torch' in sys.modules)"
    )
    path = os.pathsep.join(sys.path)
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, check=False).returncode == 0


def test_score_of_a_map_is_its_total_activation(net: VGG19) -> None:
    images = torch.rand(2, 3, 10, 12, dtype=torch.float64)
    for layer, number in (("conv1_1", 63), ("relu1_2", 5), ("pool1", 0), ("relu2_1", 127)):
        activations = net(images, [layer])[layer]
        expected = torch.stack([activations[n, number].sum() for n in range(2)])
        torch.testing.assert_close(score(net, parse_target(f"{layer}:{number}"), images), expected)


def test_saliency_and_occlusion_of_a_class(classifier: VGG19) -> None:
    target = parse_target("class:tabby")
    images = torch.rand(1, 3, 32, 40).requires_grad_()
    logit = classifier(images, ["fc8"])["fc8"][0, 281]
    (gradient,) = torch.autograd.grad(logit, images)
    torch.testing.assert_close(saliency(classifier, images, target), gradient.abs().amax(dim=1))
    covered = images.detach().clone()
    covered[:, :, :16, 16:32] = classifier.mean
    found = occlusion(classifier, images, target, size=16, stride=16)
    assert found.scores.shape == (1, 2, 3)
    torch.testing.assert_close(found.scores[:, 0, 1], score(classifier, target, covered))
    torch.testing.assert_close(found.base[0], logit.detach())
    assert torch.equal(score(classifier, target, images), logit[None])


def test_score_has_the_nets_type_and_a_gradient(net: VGG19) -> None:
    images = torch.rand(1, 3, 8, 8).requires_grad_()
    total = score(net, parse_target("relu2_1:3"), images)
    assert total.dtype == torch.float64
    assert torch.autograd.grad(total.sum(), images)[0].dtype == torch.float32


def test_score_in_half_precision_does_not_overflow() -> None:
    net = VGG19("relu1_1")
    net.conv1_1.weight.zero_()
    net.conv1_1.bias.fill_(1000)
    total = score(net.half(), parse_target("relu1_1:0"), torch.rand(1, 3, 16, 16))
    assert total.dtype == torch.float32
    assert total.item() == 256_000


def test_score_of_a_class_needs_the_classifier(net: VGG19) -> None:
    with pytest.raises(DataError, match=r"end at relu2_1, and tabby \(class 281\) needs .*--vgg auto .*relu2_1:0"):
        score(net, parse_target("class:tabby"), torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("made_of", "message"),
    [
        (lambda _: None, "got NoneType"),
        (torch.Tensor.tolist, "got list"),
        (torch.Tensor.to_sparse, "torch.sparse_coo"),
        (lambda x: x.to("meta"), "on meta"),
        (lambda x: x.to(torch.complex64), "torch.complex64"),
        (torch.Tensor.long, "divide by 255 first, as fastnst.images.to_tensor"),
    ],
)
def test_attributions_and_deconvnets_refuse_what_is_no_dense_tensor_of_floats(
    net: VGG19, made_of: Any, message: str
) -> None:
    target, images = parse_target("relu2_1:0"), made_of(torch.zeros(1, 3, 16, 16))
    for function in (
        lambda: score(net, target, images),
        lambda: saliency(net, images, target),
        lambda: occlusion(net, images, target, size=4),
        lambda: Deconvnet(net).record(images, ["relu2_1"]),
        lambda: Deconvnet(net)(images, "relu2_1", [0]),
        lambda: TransformDeconvnet(small_net("lengstrom")).record(images, ["conv1"]),
    ):
        with pytest.raises(UserError, match=f"^images are floats .*{message}"):
            function()


@pytest.mark.parametrize("target", [None, "class:207", 207, ("relu2_1", 0)])
def test_attributions_refuse_what_is_no_target(net: VGG19, target: Any) -> None:
    images = torch.zeros(1, 3, 16, 16)
    for function in (
        lambda: score(net, target, images),
        lambda: saliency(net, images, target),
        lambda: occlusion(net, images, target, size=4),
    ):
        with pytest.raises(UserError, match=r"^target is .*parse_target"):
            function()


@pytest.mark.parametrize(
    ("target", "images", "message"),
    [
        (Target("relu3_4", 0, ""), torch.zeros(1, 3, 32, 32), "relu3_4 lies behind relu2_1"),
        (Target("relu2_9", 0, ""), torch.zeros(1, 3, 32, 32), "did you mean"),
        (Target("relu2_1", 128, ""), torch.zeros(1, 3, 32, 32), "its maps are 0 … 127"),
        (Target("relu2_1", 0, ""), torch.zeros(1, 3, 1, 8), "too small for relu2_1"),
        (Target("relu2_1", 0, ""), torch.zeros(3, 32, 32), r"\[3, 32, 32\]"),
        (Target("relu2_1", 0, ""), torch.zeros(0, 3, 32, 32), r"\[0, 3, 32, 32\]"),
        (Target("relu2_1", 0, ""), torch.zeros(1, 4, 32, 32), r"\[1, 4, 32, 32\]"),
        (Target("relu2_1", 0, ""), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8.*to_tensor"),
    ],
)
def test_score_refuses_bad_targets_and_images(net: VGG19, target: Target, images: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(net, target, images)
