"""Seconds of VGG19's projections, beside input gradients and a bare forward pass.

    python benchmarks/visualize.py --folder PHOTOS [--vgg auto|random|FILE] [--size 224] [--json FILE]

First, all maps of relu3_4 on the folder's first image: projected from each map's strongest activation, and from all its
activations, including the forward pass; beside the input gradient of each map's strongest activation, by autograd with
the same weights, 16 to a batch. Then the nine strongest activations of all maps in the folder (`visualize top`), from
reading files to writing sheets; beside a bare forward pass over the same images, decoded before the clock starts.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from result_files import json_option

from fastnst.errors import UserError
from fastnst.storage import write_json

# torch is imported in functions only: the Pillow loader's processes import this file again, and would start slowly.
if TYPE_CHECKING:
    from torch import Tensor

    from fastnst.models.vgg19 import VGG19

LAYER = "relu3_4"
BATCH = 16
MAX_RATIOS = {"projections / gradients": 1.5, "top / forward pass": 3.0}


@click.command()
@click.option("--folder", required=True, type=click.Path(path_type=Path), help="Folder of images.")
@click.option("--vgg", default="auto", show_default=True, help="auto, random, or a file of VGG19's weights.")
@click.option("--size", default=224, show_default=True, help="Side of the crops, in pixels.")
@click.option("--threads", default=2, show_default=True, help="PyTorch's threads.")
@click.option("--repeats", default=1, show_default=True, help="Of each measurement; the median counts.")
@click.option("--quick", is_flag=True, help="16 maps instead of all, to check that it runs.")
@json_option
def main(folder: Path, vgg: str, size: int, threads: int, repeats: int, quick: bool, json_file: Path | None) -> None:
    """Print seconds of projections and of top activations, and compare their ratios with the allowed ones."""
    import torch
    from kernel_bench.environment import environment

    from fastnst.data.manifest import build_manifest
    from fastnst.models.weights import load_vgg19
    from fastnst.visualize.attribution.folder_batches import CenterCrops

    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    manifest = build_manifest(folder)
    net = load_vgg19(vgg, last_layer=LAYER)
    decoded = list(CenterCrops(manifest, size, cpu, batch_size=BATCH))
    maps = list(range(16 if quick else 256))
    # Batches come in an order of their own.
    first = next(batch[(indices == 0)] for indices, batch in decoded if (indices == 0).any())
    work: dict[str, Callable[[], object]] = {
        f"input gradients, {BATCH} to a batch": lambda: _gradients(net, first, maps),
        "projections of the strongest activation": lambda: _projections(net, first, maps, "strongest"),
        "projections of all activations": lambda: _projections(net, first, maps, "all"),
        "forward pass over the folder": lambda: [_forward(net, batch) for _, batch in decoded],
        "visualize top, reading to writing": lambda: _top(folder, maps, size, vgg),
    }
    rows = []
    for name, act in work.items():
        _warm_up(net, first)
        seconds = [_seconds(act) for _ in range(repeats)]
        row = {"name": name, "seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}
        rows.append(row)
        click.echo(f"{name:40} {row['seconds']:8.2f} s  ({row['fastest']:.2f} … {row['slowest']:.2f})")
    ratios = [
        _ratio("projections / gradients", rows[1], rows[0]),
        _ratio("projections / gradients", rows[2], rows[0]),
        _ratio("top / forward pass", rows[4], rows[3]),
    ]
    if json_file is not None:
        settings = {
            "layer": LAYER,
            "maps": len(maps),
            "images": len(manifest.images),
            "size": size,
            "batch_size": BATCH,
            "threads": threads,
            "repeats": repeats,
            "weights": vgg if vgg in ("auto", "random") else Path(vgg).name,
        }
        report = {"settings": settings, "environment": environment(cpu), "rows": rows, "ratios": ratios}
        write_json(json_file, report)


def _gradients(net: "VGG19", image: "Tensor", maps: list[int]) -> None:
    import torch

    for start in range(0, len(maps), BATCH):
        chosen = maps[start : start + BATCH]
        pixels = _to_images(image).expand(len(chosen), -1, -1, -1).clone(memory_format=torch.channels_last)
        activations = net(pixels.requires_grad_(), [LAYER])[LAYER]
        activations[range(len(chosen)), chosen].flatten(1).amax(1).sum().backward()
        assert pixels.grad is not None


def _projections(net: "VGG19", image: "Tensor", maps: list[int], activation: str) -> None:
    from fastnst.visualize.deconv.vgg import Deconvnet

    projections = Deconvnet(net)(_to_images(image), LAYER, maps, activation=activation)
    assert projections.shape[1] == len(maps)


def _forward(net: "VGG19", batch: "Tensor") -> None:
    import torch

    with torch.inference_mode():
        net(_to_images(batch), [LAYER])


def _top(folder: Path, maps: list[int], size: int, vgg: str) -> None:
    """Run the command, without its start-up."""
    from fastnst.visualize.commands.top import top_report
    from fastnst.visualize.sheets.report import write_report

    chosen = f"{maps[0]}-{maps[-1]}"
    report = top_report(folder, LAYER, maps=chosen, count=9, size=size, loader="pillow", vgg=vgg, device="cpu")
    with tempfile.TemporaryDirectory() as out:
        write_report(report, Path(out), command="fastnst visualize top", inputs=[])


def _warm_up(net: "VGG19", image: "Tensor") -> None:
    for _ in range(2):
        _forward(net, image)


def _to_images(batch: "Tensor") -> "Tensor":
    import torch

    from fastnst.visualize.attribution.folder_batches import to_images

    return to_images(batch, torch.float32)


def _seconds(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def _ratio(name: str, row: dict[str, Any], beside: dict[str, Any]) -> dict[str, Any]:
    ratio, allowed = row["seconds"] / beside["seconds"], MAX_RATIOS[name]
    word = "met" if ratio <= allowed else "NOT MET"
    click.echo(f"{row['name']}: {ratio:.3f} times as long as {beside['name']}; at most {allowed} asked: {word}")
    return {"name": row["name"], "beside": beside["name"], "ratio": ratio, "at_most": allowed, "met": ratio <= allowed}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"{error}") from None
