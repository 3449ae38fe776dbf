"""The cost model of a training step: FLOPs against PyTorch's count, bytes against the minimum, tables."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import roofline
import torch
from roofline import Machine, configured
from step_bench import kernel_traffic, operations
from step_bench.baseline import BaselineLoss, BaselineTransformNet, BaselineVGG19
from step_bench.cost_model import totals, training_step
from step_bench.layer_shapes import transform_convs, vgg_layers
from step_bench.operations import Operation
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastnst.config import Config, preset_names
from fastnst.models.transform_net import TransformNet
from fastnst_kernels.gram.style_loss import StyleMatrix, gram_product_reference
from helpers.run_command import script_exit_code

SIZE, BATCH = 64, 2
DEEP = ('loss.content_layers=["relu4_2"]', 'loss.style_layers=["relu1_1","relu2_1","relu3_1","relu4_1","relu5_1"]')


class Whole(nn.Module):
    """The baseline as one module, on the meta device."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        loss = config.loss
        self.net = BaselineTransformNet(config.model.architecture).to("meta")
        vgg = BaselineVGG19(tuple(dict.fromkeys((*loss.content_layers, *loss.style_layers)))).to("meta")
        self.loss = BaselineLoss(vgg, loss)
        self.loss.set_style(torch.empty(1, 3, 64, 64, device="meta"))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.loss(self.net(pixels), pixels)


def counted_by_torch(config: Config) -> dict[str, int]:
    """FLOPs of a step by layer: convolutions by the layer's name, the Gram matrices together as `gram`."""
    whole = Whole(config)
    size, batch = config.data.image_size, config.train.batch_size
    with FlopCounterMode(display=False) as counter:
        whole(torch.empty(batch, 3, size, size, device="meta")).backward()
    found: dict[str, int] = defaultdict(int)
    for path, flops in counter.get_flop_counts().items():
        parts = path.split(".")
        name = ".".join(part for part in parts if part not in ("Whole", "net", "loss", "vgg", "conv"))
        is_leaf = parts[-1] == "conv" or (parts[-1].startswith("conv") and "vgg" in parts)
        if is_leaf:
            found[name] += sum(flops.values())
    found["gram"] = counter.get_flop_counts()["Whole"][torch.ops.aten.bmm]
    # Autograd multiplies by dG and by its transpose; the library by their sum, which is what is planned.
    with FlopCounterMode(display=False) as counter:
        for layer in vgg_layers(config.loss.style_layers, size):
            if layer.relu in config.loss.style_layers:
                features = torch.zeros(batch, layer.outputs, layer.side, layer.side)
                matrix = torch.zeros(batch, layer.outputs, layer.outputs)
                gram_product_reference(features, StyleMatrix(matrix, torch.zeros(batch)))
    found["gram"] += counter.get_total_flops()
    return found


def by_layer(operations: list[Operation]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for operation in operations:
        if operation.flops:
            found["gram" if operation.kind in ("style", "tap") else operation.layer] += operation.flops
    return found


@pytest.mark.parametrize("preset", preset_names())
def test_training_step_flops_are_torchs(preset: str) -> None:
    config = configured(preset, SIZE, BATCH)
    counted, modelled = counted_by_torch(config), by_layer(training_step(config, "fp32"))
    assert modelled.keys() == counted.keys()
    for layer, flops in counted.items():
        assert modelled[layer] == pytest.approx(flops, rel=0.01), layer
    assert sum(modelled.values()) == pytest.approx(sum(counted.values()), rel=0.01)
    assert totals(training_step(config, "bf16"))["flops"] == sum(modelled.values())


def test_training_step_of_the_deep_loss_takes_192_gflop() -> None:
    operations = training_step(configured("johnson", 256, 1, DEEP), "bf16")
    convolutions = [op.flops for op in operations if op.kind not in ("style", "tap")]
    # 2·47.3 + 36.5 + 3·20.2, without the gradient of conv1's input, which nobody wants: 1.0.
    assert sum(convolutions) / 1e9 == pytest.approx(192 - 1.0, rel=0.01)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("preset", preset_names())
def test_training_step_moves_at_most_1_3_times_the_minimum(preset: str, precision: str) -> None:
    operations = training_step(configured(preset, 256, 16), precision)
    sums = totals(operations)
    assert 1 <= sums["moved_bytes"] / sums["minimum_bytes"] <= 1.3
    for operation in operations:
        # A launch is not given an input's border where it does not read it.
        assert operation.moved_bytes >= 0.95 * operation.minimum_bytes, operation


def test_transform_convs_have_the_shapes_of_the_networks() -> None:
    for architecture, sizes in (("hwalsuklee", (48, 50)), ("lengstrom", (48, 50, 51)), ("johnson", (48,))):
        for size in sizes:
            config = configured(architecture, size, 1)
            _, convs = transform_convs(config)
            net = TransformNet(architecture).to("meta")
            found: dict[str, int] = {}
            layers = {name: module for name, module in net.named_modules() if hasattr(module, "weight")}
            for name, module in layers.items():
                module.register_forward_hook(lambda _m, _i, y, name=name, to=found: to.update({name: y.shape[-1]}))
            with torch.no_grad():
                net(torch.empty(1, 3, size, size, device="meta"))
            assert list(layers) == [conv.name for conv in convs]
            for conv in convs:
                # Nearest neighbours are doubled inside the up layers on a CPU, in the norm before them on a GPU.
                doubles = architecture == "johnson" and conv.layout.upsample == 2
                assert found[conv.name] == (conv.out + 2 if doubles else conv.laid_out), (architecture, size, conv)


def test_training_step_counts_a_shared_tensor_once() -> None:
    by_name = {(op.part, op.layer, op.kind): op for op in training_step(configured("johnson", 64, 2), "fp32")}
    size, weight = 4 * 2 * 64 * 64 * 64, 4 * 9 * 64 * 64
    style = by_name[operations.LOSS, "relu1_2", "style"]
    assert style.minimum_bytes == 2 * 4 * 64 * 64 // 2 + 2 * 64 * 64 * 4 + 0  # target in, matrices out; no features
    assert style.moved_bytes > size
    gradient = by_name[operations.VGG_BACK, "conv1_2", "input gradient"]
    assert gradient.minimum_bytes == gradient.moved_bytes == 2 * size + weight
    mask = by_name[operations.VGG_BACK, "relu1_1", "mask"]
    assert (mask.minimum_bytes, mask.moved_bytes) == (size, 3 * size)


def test_operation_takes_the_longer_of_flops_and_bytes() -> None:
    operation = Operation("part", "layer", "kind", flops=10**12, minimum_bytes=10**9, moved_bytes=3 * 10**9)
    assert operation.seconds(1e12, 1e9) == 1.0
    assert operation.seconds(1e13, 1e9) == 1.0
    assert operation.seconds(1e13, 1e9, planned=True) == 3.0
    assert Machine(tflops=1.0, tb_per_s=0.0005).seconds([operation, operation]) == 4.0


def test_training_step_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_traffic, "can_record", lambda: False)
    kernel_traffic.launched_bytes.cache_clear()
    for assignments in ((), ("model.norm=batch",)):
        sums = totals(training_step(configured("johnson", 256, 16, assignments), "bf16"))
        assert 1 <= sums["moved_bytes"] / sums["minimum_bytes"] <= 1.3
    kernel_traffic.launched_bytes.cache_clear()


def test_roofline_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--preset johnson --image-size 64 --batch-size 2 --tflops 100 --tb-per-s 2".split()  # noqa: SIM905
    assert roofline.main([*arguments, "--json", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "plan.json").read_text("utf-8"))
    assert report["settings"] | {"preset": "johnson", "tflops": 100.0, "tb_per_s": 2.0} == report["settings"]
    assert report["bound_ms"] * 1000 == pytest.approx(sum(row["bound_us"] for row in report["passes"]))
    assert report["bound_images_per_second"] == pytest.approx(2000 / report["bound_ms"])
    assert f"- bound: {report['bound_ms']:.2f} ms per step" in printed
    assert report["bound_ms"] <= report["plan_ms"]
    layers = printed.split("## Layers")[1]
    for row in report["passes"]:
        assert f"| {row['part']}: {row['layer']} {row['kind']} |" in layers
    assert roofline.main([*arguments, "--markdown", str(tmp_path / "plan.md")]) == 0
    assert (tmp_path / "plan.md").read_text("utf-8") == printed


def test_roofline_refuses_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--preset", "jonson"]) == 2
    assert "unknown preset 'jonson'; did you mean 'johnson'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        roofline.main(["--tflops", "0"])
    assert "0 is not a rate; give a number above 0" in capsys.readouterr().err


def test_roofline_runs_as_a_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert script_exit_code(monkeypatch, roofline.__file__, "--image-size", 64, "--batch-size", 1) == 0
    assert capsys.readouterr().out.startswith("# A training step on 790 TFLOP/s and 4.3 TB/s")
