"""stylize: its result, its side effects, and its refusals."""

import pytest
import torch
from torch import Tensor

from fastnst import stylize
from fastnst.errors import DeviceError, UserError
from fastnst.models.transform_net import TransformNet


@pytest.fixture(scope="module")
def net() -> TransformNet:
    net = TransformNet("johnson", generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        net.out.weight.mul_(40)  # new weights give nearly black images, which hide errors
        net.out.bias.fill_(127.0)
    return net


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 23), (31, 64)])
def test_stylize_keeps_shape_and_range(net: TransformNet, height: int, width: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    stylized = stylize(net, images)
    assert stylized.shape == images.shape
    assert stylized.dtype == torch.float32
    assert stylized.is_contiguous(memory_format=torch.channels_last)
    assert stylized.std() > 0.05
    with torch.no_grad():
        assert torch.equal(stylized, net(images).clamp(0, 1))


def test_stylize_clamps() -> None:
    class Loud(TransformNet):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full_like(x, -3.0).index_fill(1, torch.tensor([0]), 5.0)

    stylized = stylize(Loud("johnson"), torch.rand(1, 3, 16, 16))
    assert (stylized[:, 0] == 1).all()
    assert (stylized[:, 1:] == 0).all()


def test_stylize_changes_neither_model_nor_images() -> None:
    net = TransformNet("johnson", "batch", generator=torch.Generator().manual_seed(0)).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    kept = images.detach().clone()
    stylized = stylize(net, images)
    assert net.training
    assert not stylized.requires_grad
    assert torch.equal(images, kept)
    for name, tensor in net.state_dict().items():  # the running statistics above all
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(stylized, stylize(net.eval(), kept))
    assert not net.training


def test_stylize_in_bf16_is_near_fp32(net: TransformNet) -> None:
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact, rough = stylize(net, images), stylize(net, images, precision="bf16")
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert (rough - exact).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("images", "options", "reason"),
    [
        (torch.rand(3, 16, 16), {}, r"\[3, 16, 16\]"),
        (torch.rand(1, 1, 16, 16), {}, r"\[1, 1, 16, 16\]"),
        (torch.rand(1, 3, 15, 40), {}, "16 pixels or more"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), {}, "got torch.uint8; divide by 255"),
        (torch.rand(1, 3, 16, 16), {"precision": "fp8"}, "unknown precision 'fp8'"),
    ],
)
def test_stylize_refuses_wrong_arguments(
    net: TransformNet, images: Tensor, options: dict[str, str], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        stylize(net, images, **options)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000 bytes."),
    ],
)
def test_stylize_explains_out_of_memory(net: TransformNet, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> Tensor:
        raise error

    monkeypatch.setattr(TransformNet, "forward", fail)
    with pytest.raises(DeviceError, match=r"cpu has too little memory for 2 images of 40 × 30 px"):
        stylize(net, torch.rand(2, 3, 30, 40))


def test_stylize_passes_other_errors_on(net: TransformNet, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("something else")

    monkeypatch.setattr(TransformNet, "forward", fail)
    with pytest.raises(RuntimeError, match="something else"):
        stylize(net, torch.rand(1, 3, 16, 16))
