"""Style models: a saved net comes back to the last bit, describes itself, and anything else is refused."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

import fastnst
from fastnst.errors import DataError, DeviceError
from fastnst.models.architectures import ARCHITECTURES
from fastnst.models.style_model import MODEL_NAME, load_style_model, read_style_metadata, save_style_model
from fastnst.models.transform_net import NORMS, TransformNet

ORIGIN = {"preset": "johnson", "style": "wave_crop.jpg", "style_sha256": "ab" * 32, "steps": "300"}


def make_net(architecture: str = "johnson", norm: str = "instance") -> TransformNet:
    return TransformNet(architecture, norm, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def net() -> TransformNet:
    return make_net()


def save(folder: Path, net: TransformNet, **metadata: str) -> Path:
    path = folder / MODEL_NAME
    save_style_model(path, net, metadata={**ORIGIN, **metadata})
    return path


@pytest.mark.parametrize("error", [OSError("No such device (os error 19)"), PermissionError("(os error 13)")])
def test_load_style_model_reads_where_files_cannot_be_mapped(
    net: TransformNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    path = save(tmp_path, net)
    monkeypatch.setattr("fastnst.models.files.safetensors_file.safe_open", refuse)
    assert read_style_metadata(path)["steps"] == "300"
    loaded = load_style_model(path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in net.state_dict().items())
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(DataError, match="holds no model"):
        load_style_model(tmp_path / "folder.safetensors")


def contents(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_style_model(path)
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_load_style_model_gives_the_saved_network(tmp_path: Path, architecture: str, norm: str) -> None:
    net = make_net(architecture, norm)
    for tensor in net.state_dict().values():  # running statistics, scales and shifts other than at the start
        tensor.add_(0.01 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(2)))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    path = save(tmp_path, net)
    random_state = torch.get_rng_state()
    back = load_style_model(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (back.architecture, back.norm, back.training) == (architecture, norm, False)
    assert not any(parameter.requires_grad for parameter in back.parameters())
    assert back.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert list(back.state_dict()) == list(before)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert torch.equal(net.state_dict()[name], before[name]), name
    image = torch.rand(1, 3, 19, 22, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        stylized = back(image)
        assert torch.isfinite(stylized).all()
        assert torch.equal(stylized, net.eval()(image))


def test_load_style_model_takes_paths_and_devices(tmp_path: Path, net: TransformNet) -> None:
    path = save(tmp_path, net)
    for form in (path, tmp_path, str(path), str(tmp_path)):
        assert torch.equal(load_style_model(form).out.weight, net.out.weight)
    assert load_style_model(path, device=torch.device("cpu")).out.weight.device.type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="use --device cpu"):
            load_style_model(path, device="cuda")


def test_style_model_describes_itself(tmp_path: Path) -> None:
    """The keys of the format cannot be overridden."""
    path = save(tmp_path, make_net("lengstrom", "batch"), architecture="johnson", kind="x", format_version="9")
    metadata, tensors = contents(path)
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


def test_save_style_model_refuses_nonfinite_weights(tmp_path: Path, net: TransformNet) -> None:
    path = save(tmp_path, net)
    good = path.read_bytes()
    bad = make_net()
    with torch.no_grad():
        bad.res3.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match=r"res3.conv1.weight holds values that are not finite"):
        save(tmp_path, bad)
    assert path.read_bytes() == good


def test_load_style_model_refuses_other_files(tmp_path: Path, net: TransformNet) -> None:
    assert "there is no style model" in refusal(tmp_path / "absent.safetensors")
    assert "holds no model.safetensors" in refusal(tmp_path)
    path = save(tmp_path, net)
    whole = path.read_bytes()
    for content, reason in (
        (b"", "is an empty file, not a style model; fetch it again"),
        (b"text", "is a text, not a style model; give a model.safetensors or run directory"),
        (b"<!DOCTYPE html><title>Download</title>", "is a web page, .*download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, .*git lfs pull"),
        (b"\xff\xd8\xff\xe0 JFIF", "is a JPEG, not a style model; the model comes first"),
        (b"4\n1\n3\nV 1\n13\nnn.Sequential", "is a file of Torch7, .*networks of other projects are not read"),
        (b"\x08\x07\x12\x07pytorch", "is an ONNX model, .*networks of other projects are not read"),
    ):
        path.write_bytes(content)
        assert re.search(reason, refusal(path)), refusal(path)
    for content in (b"\xff" * 100, *(whole[: int(len(whole) * part)] for part in (0.1, 0.5, 0.999))):
        path.write_bytes(content)
        assert "not a safetensors file, or it is cut short" in refusal(path)
    names = [f"features.{index}.weight" for index in (0, 2, 5, 7)]
    path.write_bytes(safetensors.torch.save({name: torch.zeros(1) for name in names}))
    text = refusal(path)
    assert "another kind of model: it holds features.0.weight, features.2.weight, features.5.weight and 1 more" in text
    with pytest.raises(DataError, match="another kind"):
        read_style_metadata(path)


def test_load_style_model_names_the_file_that_was_meant(tmp_path: Path, net: TransformNet) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert "no style model was saved there yet" in refusal(run / "checkpoints" / "step_00000001")
    save(run, net)
    (run / "config.toml").write_text('preset = "johnson"')
    assert f"is a text, not a style model; give the run directory {run}" in refusal(run / "config.toml")
    for folder in (run / "checkpoints", run / "checkpoints" / "step_00000001"):
        assert f"it belongs to the run {run}; give that" in refusal(folder)
    assert f"such as {run}" in refusal(tmp_path)
    torch.save(net.state_dict(), tmp_path / "mosaic.pth")
    assert "mosaic.pth is a zip file of torch.save, not a style model" in refusal(tmp_path / "mosaic.pth")
    np.savez(tmp_path / "udnie.npz", Variable=np.zeros(1))
    assert "load_lengstrom_npz" in refusal(tmp_path / "udnie.npz")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_load_style_model_reads_a_wrapped_net(tmp_path: Path, net: TransformNet, prefix: str) -> None:
    metadata, tensors = contents(save(tmp_path, net))
    wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(wrapped, tmp_path / "model.safetensors", metadata=metadata)
    assert torch.equal(load_style_model(tmp_path).out.weight, net.out.weight)


METADATA = [
    ({"format_version": "2", "fastnst_version": "7.0"}, "written by fastnst 7.0 in format 2, and"),
    ({"format_version": "2"}, "reads up to format 1; install a newer fastnst"),
    ({"format_version": "one"}, "format version is 'one'"),
    ({"architecture": "gatys"}, "unknown architecture 'gatys'"),
    ({"norm": "layer"}, "unknown norm 'layer'"),
    ({"architecture": "lengstrom"}, "a lengstrom net with instance norm"),
    ({"norm": "batch"}, "a johnson net with batch norm lacks conv1.running_mean"),
]
OTHER_SHAPE = "conv1.weight is [32, 3, 3, 3] torch.float32, a johnson net with instance norm needs [32, 3, 9, 9]"
TENSORS: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
    (lambda tensors: tensors.pop("out.bias"), "lacks out.bias"),
    (lambda tensors: tensors.update(extra=torch.zeros(1)), "has no extra"),
    (lambda tensors: tensors.update({"conv1.weight": torch.zeros(32, 3, 3, 3)}), OTHER_SHAPE),
    (lambda tensors: tensors.update({"conv1.weight": tensors["conv1.weight"].int()}), "[32, 3, 9, 9] torch.int32"),
    (lambda tensors: tensors["up1.scale"].fill_(float("inf")), "up1.scale holds values that are not finite"),
]


def test_load_style_model_refuses_changed_metadata_and_weights(tmp_path: Path, net: TransformNet) -> None:
    path = save(tmp_path, net)
    whole = path.read_bytes()
    for change, reason in (*METADATA, *TENSORS):
        path.write_bytes(whole)
        metadata, tensors = contents(path)
        if callable(change):
            change(tensors)
        else:
            metadata |= change
        path.write_bytes(safetensors.torch.save(tensors, metadata=metadata))
        assert reason in refusal(path)


@pytest.mark.gpu
def test_load_style_model_onto_a_gpu(tmp_path: Path, net: TransformNet) -> None:
    loaded = load_style_model(save(tmp_path, net), device="cuda")
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cuda"}
    assert torch.equal(load_style_model(save(tmp_path, loaded)).out.weight, net.out.weight)
