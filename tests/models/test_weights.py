"""Loading VGG19: files of every kind, and the detection of their flavour."""

import hashlib
import os
import pickle
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
    monkeypatch.setattr("fastnst.models.safetensors_file.safe_open", refuse)
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
    for content in (b"", b"a text file, not weights", command, whole[: len(whole) // 2], whole[:100]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is damaged or no weights file") as caught:
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
    path.write_bytes(b"x" * 2_500_000)
    assert describe_source(str(path)) == f"{path}, 2.5 MB"
    assert describe_source("auto") == f"to be downloaded from {TORCHVISION.url}, 574.7 MB"
    monkeypatch.setenv("FASTNST_VGG19_URL", "http://mirror/vgg")
    assert "http://mirror/vgg" in describe_source("auto")
    ours = tmp_path / "cache" / "weights" / TORCHVISION.file_name
    ours.parent.mkdir(parents=True)
    with ours.open("wb") as file:
        file.truncate(TORCHVISION.size)
    assert describe_source("auto") == str(ours)
