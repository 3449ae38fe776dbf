"""The style model's file: what is saved comes back, says what it is, and is refused when it is anything else."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

import fastnst
from fastnst.errors import DataError, DeviceError
from fastnst.models.style_model import MODEL_NAME, load_style_model, read_style_metadata, save_style_model
from fastnst.models.transform_net import ARCHITECTURES, NORMS, TransformNet

ORIGIN = {"preset": "johnson", "style": "wave_crop.jpg", "style_sha256": "ab" * 32, "steps": "300"}


def make_net(architecture: str = "johnson", norm: str = "instance") -> TransformNet:
    return TransformNet(architecture, norm, generator=torch.Generator().manual_seed(1))


def save(folder: Path, net: TransformNet | None = None) -> Path:
    path = folder / MODEL_NAME
    save_style_model(path, net or make_net(), metadata=ORIGIN)
    return path


def contents(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict


def rewrite(
    path: Path,
    change: Callable[[dict[str, Tensor]], None] = lambda _: None,
    **metadata: str,
) -> None:
    before, tensors = contents(path)
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata={**before, **metadata}))


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_style_model(path)
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_network_comes_back_to_the_last_bit(tmp_path: Path, architecture: str, norm: str) -> None:
    net = make_net(architecture, norm)
    for tensor in net.state_dict().values():  # running statistics, scales and shifts other than at the start
        tensor.add_(0.01 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(2)))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    back = load_style_model(save(tmp_path, net))
    assert (back.architecture, back.norm) == (architecture, norm)
    assert list(back.state_dict()) == list(before)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert torch.equal(net.state_dict()[name], before[name]), name
    image = torch.rand(1, 3, 19, 22, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        painted = back(image)
        assert torch.isfinite(painted).all()
        assert torch.equal(painted, net.eval()(image))


def test_it_comes_back_ready_to_use(tmp_path: Path) -> None:
    path = save(tmp_path)
    net = load_style_model(path)
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert net.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    for form in (tmp_path, str(path), str(tmp_path)):
        assert torch.equal(load_style_model(form).out.weight, net.out.weight)
    assert load_style_model(path, device=torch.device("cpu")).out.weight.device.type == "cpu"


def test_loading_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    path = save(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_style_model(path)
    assert torch.equal(torch.rand(3), expected)


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    metadata, tensors = contents(save(tmp_path, make_net("lengstrom", "batch")))
    assert metadata == {
        **ORIGIN,
        "kind": "fastnst style model",
        "format_version": "1",
        "architecture": "lengstrom",
        "norm": "batch",
        "fastnst_version": fastnst.__version__,
    }
    assert read_style_metadata(tmp_path) == metadata
    assert {"conv1.weight", "res1.conv1.scale", "out.shift", "up2.running_mean"} <= set(tensors)


def test_its_own_keys_cannot_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / MODEL_NAME
    save_style_model(
        path, make_net("johnson"), metadata={"architecture": "lengstrom", "kind": "x", "format_version": "9"}
    )
    assert load_style_model(path).architecture == "johnson"


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    path = save(tmp_path)
    good = path.read_bytes()
    net = make_net()
    with torch.no_grad():
        net.res3.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match=r"res3.conv1.weight holds values that are not finite"):
        save(tmp_path, net)
    assert path.read_bytes() == good


def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path)
    good = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        save(tmp_path, make_net("lengstrom"))
    assert path.read_bytes() == good
    assert list(tmp_path.iterdir()) == [path]


# What is refused.


def test_a_file_or_model_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no style model" in refusal(tmp_path / "absent.safetensors")
    assert "holds no model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 a zip file, as torch.save writes it", b"\xff" * 100])
def test_a_file_that_is_no_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / MODEL_NAME
    path.write_bytes(content)
    assert "not a safetensors file" in refusal(path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.999])
def test_a_file_that_is_cut_short(tmp_path: Path, keep: float) -> None:
    path = save(tmp_path)
    os.truncate(path, int(path.stat().st_size * keep))
    assert "cut short" in refusal(path)


def test_another_kind_of_model(tmp_path: Path) -> None:
    path = tmp_path / "vgg.safetensors"
    names = [f"features.{index}.weight" for index in (0, 2, 5, 7)]
    path.write_bytes(safetensors.torch.save({name: torch.zeros(1) for name in names}))
    text = refusal(path)
    assert "another kind of model: it holds features.0.weight, features.2.weight, features.5.weight and 1 more" in text
    with pytest.raises(DataError, match="another kind"):
        read_style_metadata(path)


def test_a_newer_format(tmp_path: Path) -> None:
    path = save(tmp_path)
    rewrite(path, format_version="2", fastnst_version="7.0")
    text = refusal(path)
    assert "written by fastnst 7.0 in format 2" in text
    assert "reads up to format 1; install a newer fastnst" in text


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"format_version": "one"}, "format version is 'one'"),
        ({"architecture": "gatys"}, "unknown architecture 'gatys'"),
        ({"norm": "layer"}, "unknown norm 'layer'"),
        ({"architecture": "lengstrom"}, "a lengstrom net with instance norm"),
        ({"norm": "batch"}, "a johnson net with batch norm lacks conv1.running_mean"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path: Path, metadata: dict[str, str], reason: str) -> None:
    path = save(tmp_path)
    rewrite(path, **metadata)
    assert reason in refusal(path)


def set_shape(tensors: dict[str, Tensor]) -> None:
    tensors["conv1.weight"] = torch.zeros(32, 3, 3, 3)


def set_type(tensors: dict[str, Tensor]) -> None:
    tensors["conv1.weight"] = tensors["conv1.weight"].to(torch.int32)


def set_infinite(tensors: dict[str, Tensor]) -> None:
    tensors["up1.scale"][3] = float("inf")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop("out.bias"), "lacks out.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "has no extra"),
        (
            set_shape,
            "conv1.weight is [32, 3, 3, 3] torch.float32, a johnson net with instance norm needs [32, 3, 9, 9]",
        ),
        (set_type, "conv1.weight is [32, 3, 9, 9] torch.int32"),
        (set_infinite, "up1.scale holds values that are not finite"),
    ],
)
def test_damaged_weights(tmp_path: Path, change: Callable[[dict[str, Tensor]], None], reason: str) -> None:
    path = save(tmp_path)
    rewrite(path, change)
    assert reason in refusal(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="use --device cpu"):
        load_style_model(save(tmp_path), device="cuda")


@pytest.mark.gpu
def test_it_is_loaded_onto_a_gpu(tmp_path: Path) -> None:
    net = load_style_model(save(tmp_path), device="cuda")
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"cuda"}
    back = save(tmp_path, net)
    assert torch.equal(load_style_model(back).out.weight, net.out.weight.cpu())
