"""Painting tensors: what comes back, what stays untouched, and what is refused."""

import pytest
import torch
from torch import Tensor

import fastnst.inference  # the module, imported before the function of the same name
from fastnst import stylize
from fastnst.errors import DeviceError, UserError
from fastnst.models.transform_net import TransformNet


@pytest.fixture(scope="module")
def net() -> TransformNet:
    net = TransformNet("johnson", generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        net.out.weight.mul_(40)  # fresh weights paint nearly black: every error would look alike
        net.out.bias.fill_(127.0)
    return net


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 23), (31, 64)])
def test_a_batch_keeps_its_shape_and_range(net: TransformNet, height: int, width: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    painted = stylize(net, images)
    assert painted.shape == images.shape
    assert painted.dtype == torch.float32
    assert painted.is_contiguous(memory_format=torch.channels_last)
    assert painted.std() > 0.05
    with torch.no_grad():
        assert torch.equal(painted, net(images).clamp(0, 1))


def test_results_are_clamped() -> None:
    class Loud(TransformNet):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full_like(x, -3.0).index_fill(1, torch.tensor([0]), 5.0)

    painted = stylize(Loud("johnson"), torch.rand(1, 3, 16, 16))
    assert (painted[:, 0] == 1).all()
    assert (painted[:, 1:] == 0).all()


def test_the_model_and_the_images_stay_as_they_were() -> None:
    net = TransformNet("johnson", "batch", generator=torch.Generator().manual_seed(0)).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    kept = images.detach().clone()
    painted = stylize(net, images)
    assert net.training
    assert not painted.requires_grad
    assert torch.equal(images, kept)
    for name, tensor in net.state_dict().items():  # the running statistics above all
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(painted, stylize(net.eval(), kept))
    assert not net.training


def test_bf16_is_near_fp32(net: TransformNet) -> None:
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
def test_tensors_that_cannot_be_painted(
    net: TransformNet, images: Tensor, options: dict[str, str], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        stylize(net, images, **options)


def test_the_public_name_is_the_function_whatever_was_imported_first() -> None:
    import fastnst as package

    assert callable(package.stylize)
    assert package.stylize is stylize
    assert fastnst.inference is stylize


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000 bytes."),
    ],
)
def test_running_out_of_memory_is_no_traceback(
    net: TransformNet, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> Tensor:
        raise error

    monkeypatch.setattr(TransformNet, "forward", fail)
    with pytest.raises(DeviceError, match=r"cpu has too little memory for 2 images of 40 × 30 px"):
        stylize(net, torch.rand(2, 3, 30, 40))


def test_other_errors_of_pytorch_stay_what_they_are(net: TransformNet, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("something else")

    monkeypatch.setattr(TransformNet, "forward", fail)
    with pytest.raises(RuntimeError, match="something else"):
        stylize(net, torch.rand(1, 3, 16, 16))
