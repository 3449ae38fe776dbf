"""Loading VGG19: files of every kind, and the detection of their flavour."""

import hashlib
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastnst.errors import DataError, UserError
from fastnst.models import weights as weights_module
from fastnst.models.vgg19 import VGG19, WEIGHT_SHAPES
from fastnst.models.weights import TORCHVISION, WeightsUnavailable, describe_source, load_vgg19, torchvision_key
from helpers.malformed.files import Call
from helpers.vgg19_files import vgg19_file, vgg19_state


@pytest.fixture(autouse=True)
def _log_messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastnst")


def _load(spec: str, last_layer: str = "relu2_1", **options: Any) -> VGG19:
    return load_vgg19(spec, last_layer=last_layer, **options)


def _same_weights(net: VGG19, state: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(parameter, state[f"{torchvision_key(name.partition('.')[0])}.{name.partition('.')[2]}"])
        for name, parameter in net.named_parameters()
    )


@pytest.mark.parametrize("name", ["vgg19.pth", "vgg19.safetensors"])
def test_load_vgg19_reads_either_format(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    state = vgg19_state()
    random_state = torch.get_rng_state()
    net = _load(vgg19_file(tmp_path, state, name))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert _same_weights(net, state)
    assert (net.flavour, net.last_layer) == ("torchvision", "relu2_1")
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert caplog.messages == [
        f"VGG19: {tmp_path / name} up to relu2_1, torchvision flavour (conv1_1 is torchvision's)"
    ]


@pytest.mark.parametrize("name", ["vgg19.pth", "vgg19.safetensors"])
def test_load_vgg19_reads_where_files_cannot_be_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    load = torch.load

    def without_maps(*arguments: Any, mmap: bool, **options: Any) -> Any:
        if mmap:
            raise RuntimeError("unable to mmap 574673361 bytes from file <vgg19.pth>: No such device (19)")
        return load(*arguments, mmap=mmap, **options)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("No such device (os error 19)")

    monkeypatch.setattr(torch, "load", without_maps)
    monkeypatch.setattr("fastnst.models.files.safetensors_file.safe_open", refuse)
    state = vgg19_state()
    assert _same_weights(_load(vgg19_file(tmp_path, state, name)), state)


def test_load_vgg19_reads_the_older_torch_format_and_checkpoints(tmp_path: Path) -> None:
    state = vgg19_state()
    assert _same_weights(_load(vgg19_file(tmp_path, state, _use_new_zipfile_serialization=False)), state)
    assert _same_weights(_load(vgg19_file(tmp_path, {"state_dict": state, "epoch": 3})), state)


def test_load_vgg19_reads_deeper_files_in_half_precision(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in vgg19_state("relu3_1").items()}
    net = _load(vgg19_file(tmp_path, state), "relu1_2")
    assert net.flavour == "torchvision"
    assert net.conv1_2.weight.dtype == torch.float32
    assert torch.equal(net.conv1_2.weight, state["features.2.weight"].float())


def _renamed(state: dict[str, Tensor], pattern: str, replacement: str) -> dict[str, Tensor]:
    renamed = {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}
    assert len(renamed) == len(state)
    return renamed


def _caffe_names(state: dict[str, Tensor], names: Mapping[str, str] = {}) -> dict[str, Tensor]:
    """Name a state by VGG19's layers, and those by `names`."""
    layers = {torchvision_key(layer): layer for layer in WEIGHT_SHAPES}
    named = {}
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        named[f"{names.get(layers[layer], layers[layer])}.{kind}"] = tensor
    return named


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        ("^", "module."),
        ("^", "_orig_mod."),
        ("^", "model.vgg19."),
        ("^features", "features.module"),
        (r"^features\.", ""),
        (r"^features\.", "module."),
        (r"^features\.", "layers."),
    ],
)
def test_load_vgg19_reads_other_key_names(tmp_path: Path, pattern: str, replacement: str, suffix: str) -> None:
    state = vgg19_state()
    path = vgg19_file(tmp_path, _renamed(state, pattern, replacement), f"vgg19{suffix}")
    net = _load(path)
    assert _same_weights(net, state)
    assert net.flavour == "torchvision"


@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_vgg19_reads_caffes_names_in_any_order(tmp_path: Path, prefix: str) -> None:
    state = vgg19_state("relu3_4")
    named = {prefix + name: tensor for name, tensor in reversed(_caffe_names(state).items())}
    net = _load(vgg19_file(tmp_path, {"model": named, "epoch": 3}), "relu3_4")
    assert _same_weights(net, state)
    assert not torch.equal(net.conv3_2.weight, net.conv3_3.weight)


def test_load_vgg19_takes_no_order_from_anything_but_names(tmp_path: Path) -> None:
    """conv3_2 to conv3_4 have one shape: a file that numbers its layers otherwise must not be read."""
    state = vgg19_state("relu3_4")
    names = [f"{index}.{kind}" for index in range(8) for kind in ("weight", "bias")]
    plain = dict(zip(names, state.values(), strict=True))
    shifted = _renamed(state, r"\.16\.", ".17.")
    mixed = state | {"conv3_4.weight": state["features.16.weight"], "conv3_4.bias": state["features.16.bias"]}
    twice = state | {"features.module.0.weight": state["features.0.weight"]}
    unknown = _caffe_names(state, {"conv3_4": "conv3_5"})
    for wrong in (plain, shifted, mixed, twice, unknown):
        with pytest.raises(DataError, match="another network than VGG19"):
            _load(vgg19_file(tmp_path, wrong), "relu3_4")


def test_load_vgg19_reads_shapes_that_hold_the_same_numbers(tmp_path: Path) -> None:
    state = vgg19_state()
    state["features.2.bias"] = state["features.2.bias"].view(1, -1, 1, 1)
    assert _same_weights(_load(vgg19_file(tmp_path, state)), vgg19_state())


def test_load_vgg19_names_other_vggs(tmp_path: Path) -> None:
    state = vgg19_state("relu4_1")
    bn = vgg19_state() | {"features.1.weight": torch.ones(64), "features.1.running_mean": torch.zeros(64)}
    vgg16 = {name: state[name] for name in state if ".16." not in name}
    as_torchvision = _renamed(vgg16, r"\.19\.", ".17.")
    as_caffe = _caffe_names(vgg16)
    for wrong, layer, reason in (
        (bn, "relu1_1", "batch normalization, such as vgg19_bn"),
        (as_torchvision, "relu1_1", r"features\.17\.weight is .* and VGG19 has no such tensor, VGG16 has"),
        (as_caffe, "relu1_1", "lacks conv3_4 and goes on to conv4_1; give all"),
    ):
        with pytest.raises(DataError, match=reason):
            _load(vgg19_file(tmp_path, wrong), layer)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"MATLAB 5.0 MAT-file, Platform: GLNXA64" + bytes(200), "is a MATLAB file, and .*--vgg auto.*convert it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "is an HDF5 file, as Keras writes, and "),
        (b"\x0a\x14VGG_ILSVRC_19_layers\x12\x09", "is a Caffe model, and "),
        (b"\x93NUMPY\x01\x00", "is a NumPy array, and "),
        (b"\xff\xd8\xff\xe0", "is a JPEG, and --vgg takes the weights of VGG19, not an image"),
        (b"\x1f\x8b\x08\x00", "is a gzip archive, and .*unpack it, and give the file inside"),
        (b"<html><body>Sign in</body></html>", "is a web page, and .*download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS, and .*git lfs pull"),
    ],
)
def test_load_vgg19_says_what_another_file_is(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "imagenet-vgg-verydeep-19.mat"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        _load(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=reason):
        describe_source(str(path))


def test_load_vgg19_reads_a_file_under_any_suffix(tmp_path: Path) -> None:
    state = vgg19_state()
    for name, other in (("a.pth", "vgg19.safetensors"), ("b.safetensors", "vgg19.bin")):
        written = Path(vgg19_file(tmp_path, state, name))
        assert _same_weights(_load(str(written.rename(tmp_path / other))), state)


def test_load_vgg19_detects_real_caffe_weights(weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    link = tmp_path / "torchvision_vgg19.pth"
    link.symlink_to(weights / "vgg19_caffe_conv1_1-conv3_4.pth")
    assert _load(str(link), "relu3_4").flavour == "caffe"
    assert "conv1_1 is the original of Oxford" in caplog.text


def test_load_vgg19_takes_the_flavour_of_metadata(tmp_path: Path) -> None:
    state = vgg19_state()
    assert _load(vgg19_file(tmp_path, state, "a.safetensors", metadata={"flavour": "caffe"})).flavour == "caffe"
    with pytest.raises(DataError, match="'keras'"):
        _load(vgg19_file(tmp_path, state, "b.safetensors", metadata={"flavour": "keras"}))


def test_load_vgg19_takes_the_flavour_of_option_or_checksum(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = vgg19_file(tmp_path, vgg19_state(kernel=None), "vgg19_caffe.pth")
    with pytest.raises(
        DataError, match=r"cannot tell.*--set loss\.vgg_flavour=torchvision or --set loss\.vgg_flavour=caffe"
    ):
        _load(path)
    assert _load(path, flavour="caffe").flavour == "caffe"
    assert "as loss.vgg_flavour says" in caplog.text
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    monkeypatch.setattr(weights_module, "_KNOWN_DIGESTS", {digest[:8]: "caffe"})
    assert _load(path).flavour == "caffe"
    swapped = vgg19_state()
    swapped["features.0.weight"] = swapped["features.0.weight"].flip(1).contiguous()
    with pytest.raises(DataError, match="cannot tell"):
        _load(vgg19_file(tmp_path, swapped))


def test_load_vgg19_refuses_files_with_too_few_layers(tmp_path: Path) -> None:
    path = vgg19_file(tmp_path, vgg19_state("relu2_1"))
    with pytest.raises(DataError, match=r"lacks conv2_2, conv3_1, which relu3_1 needs; choose .* up to relu2_1"):
        _load(path, "relu3_1")
    state = vgg19_state("relu2_1")
    del state["features.2.bias"]
    with pytest.raises(DataError, match=r"lacks conv1_2, which relu2_1 needs; choose loss layers up to relu1_1"):
        _load(vgg19_file(tmp_path, state))


def test_load_vgg19_refuses_other_networks(tmp_path: Path) -> None:
    vgg16 = vgg19_state() | {"features.17.weight": torch.zeros(512, 256, 3, 3)}
    alexnet = vgg19_state() | {"features.0.weight": torch.zeros(64, 3, 11, 11)}
    resnet = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    for state, reason in (
        (vgg16, r"another network than VGG19: features\.17\.weight .*no such tensor"),
        (alexnet, r"features\.0\.weight is \[64, 3, 11, 11\]"),
        (resnet, r"torchvision's key names.*but conv1\.weight"),
        ({}, "but nothing"),
    ):
        with pytest.raises(DataError, match=reason):
            _load(vgg19_file(tmp_path, state))


@pytest.mark.parametrize("name", ["vgg19.pth", "vgg19.safetensors"])
def test_load_vgg19_refuses_damaged_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    whole = Path(vgg19_file(tmp_path, vgg19_state(), "whole" + path.suffix)).read_bytes()
    command = pickle.dumps(Call(os.system, "true"))
    for content, reason in (
        (b"", "is an empty file, and not VGG19's weights; fetch it again"),
        (b"a text file, not weights", "is a text, and not VGG19's weights"),
        (command, "is a pickle of Python|is damaged or no weights file"),
        (whole[: len(whole) // 2], "is damaged or no weights file"),
        (whole[:100], "is damaged or no weights file"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=reason) as caught:
            _load(str(path))
        assert str(path) in str(caught.value)
        assert str(caught.value).count("\n") <= 1


def test_load_vgg19_refuses_other_content(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dictionary of tensors"):
        _load(vgg19_file(tmp_path, [torch.zeros(3)]))
    state = vgg19_state()
    state["features.2.weight"][5, 5, 1, 1] = float("nan")
    with pytest.raises(DataError, match=r"features\.2\.weight \(conv1_2\) holds values that are not finite numbers"):
        _load(vgg19_file(tmp_path, state))
    with pytest.raises(DataError, match="No such file"):
        _load(str(tmp_path / "absent.pth"))
    with pytest.raises(DataError, match="are a folder"):
        _load(str(tmp_path))
    with pytest.raises(UserError, match="did you mean 'relu4_2'"):
        _load("random", "relu4_22")
    with pytest.raises(UserError, match="auto, torchvision, caffe"):
        _load("random", flavour="tensorflow")


def test_load_vgg19_random_weights_are_seeded_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    random_state = torch.get_rng_state()
    first, second, other = (_load("random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(first.conv2_1.weight, second.conv2_1.weight)
    assert not torch.equal(first.conv2_1.weight, other.conv2_1.weight)
    assert first.flavour == "torchvision"
    assert _load("random", flavour="caffe").flavour == "caffe"
    assert len(caplog.messages) == 4
    assert caplog.records[0].levelname == "WARNING"
    assert "RANDOM" in caplog.messages[0]
    assert "--vgg FILE" in caplog.messages[0]


def test_torchvision_key() -> None:
    assert [torchvision_key(layer) for layer in ("conv1_1", "conv3_4", "conv5_4", "fc8")] == [
        *("features.0", "features.16", "features.34", "classifier.6")
    ]
    assert len({torchvision_key(layer) for layer in WEIGHT_SHAPES}) == 19


def test_load_vgg19_without_a_home_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTNST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("fastnst.storage.cache.home_folder", lambda: None)
    with pytest.raises(WeightsUnavailable, match="set FASTNST_CACHE=FOLDER, give a file") as caught:
        _load("auto", source=replace(TORCHVISION, url="http://127.0.0.1:9/vgg19.pth"), pause=0.0)
    assert os.devnull not in str(caught.value)


def test_describe_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert "random" in describe_source("random")
    path = tmp_path / "vgg19.pth"
    with pytest.raises(DataError, match="No such file"):
        describe_source(str(path))
    path.write_bytes(bytes(2_500_000))
    assert describe_source(str(path)) == f"{path}, 2.5 MB"
    assert describe_source("auto") == f"to be downloaded from {TORCHVISION.url}, 574.7 MB"
    monkeypatch.setenv("FASTNST_VGG19_URL", "http://mirror/vgg")
    assert "http://mirror/vgg" in describe_source("auto")
    ours = tmp_path / "cache" / "weights" / TORCHVISION.file_name
    ours.parent.mkdir(parents=True)
    with ours.open("wb") as file:
        file.truncate(TORCHVISION.size)
    assert describe_source("auto") == str(ours)
