"""Seconds and memory of `stylize_pixels` in strips, beside the whole image at once.

    python benchmarks/stylize.py [--sizes 1024x768,6000x4000] [--architecture hwalsuklee] [--json FILE]

Each measurement is a process of its own: its peak of resident memory above what is resident once the libraries and the
network are loaded, the image and the result included. The whole image is left out where its memory is not there. Both
results must agree within a level before a row is printed. Rows already in the `--json` file, of the same settings, are
kept, so that sizes can be measured one by one.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from result_files import json_option

from fastnst.errors import UserError
from fastnst.storage import write_json

WAYS = ("strips", "whole")
MAX_DIFFERENCE = 1


@click.command()
@click.option("--sizes", default="1024x768,3000x2000,6000x4000,12000x8000", show_default=True, help="Width x height.")
@click.option("--architecture", default="hwalsuklee", show_default=True, help="Of the network, with seeded weights.")
@click.option("--threads", default=2, show_default=True, help="PyTorch's threads.")
@json_option
@click.option("--measure", type=(click.Choice(WAYS), click.Path(path_type=Path)), hidden=True)
def main(sizes: str, architecture: str, threads: int, json_file: Path | None, measure: tuple[str, Path] | None) -> None:
    """Print a row per size: seconds and peak memory of both ways, and their ratios."""
    parsed = [_parse(size) for size in sizes.split(",")]
    if measure is not None:
        click.echo(json.dumps(_measure(*measure, *parsed[0], architecture, threads)))
        return
    import torch
    from kernel_bench.environment import environment

    settings = {"architecture": architecture, "threads": threads}
    rows = _rows_of(json_file, settings)
    click.echo(f"{'size':>12} {'strips':>19} {'whole image':>19} {'time':>6} {'memory':>6}  largest difference")
    for width, height in parsed:
        row = _row(width, height, architecture, threads)
        click.echo(_line(row))
        rows = [other for other in rows if (other["width"], other["height"]) != (width, height)] + [row]
        if json_file is not None:
            rows.sort(key=lambda each: each["width"] * each["height"])
            write_json(json_file, {"settings": settings, "environment": environment(torch.device("cpu")), "rows": rows})


def _row(width: int, height: int, architecture: str, threads: int) -> dict[str, Any]:
    """Measure both ways in new processes, and compare their results."""
    row: dict[str, Any] = {"width": width, "height": height}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            out = Path(folder) / f"{way}.npy"
            command = [sys.executable, __file__, "--sizes", f"{width}x{height}", "--architecture", architecture]
            command += ["--threads", str(threads), "--measure", way, str(out)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise UserError(f"{way} of {width} × {height} px failed, see above")
            row[way] = json.loads(done.stdout)
        if row["whole"] is not None:
            row["difference"] = _difference(Path(folder))
            if row["difference"] > MAX_DIFFERENCE:
                raise UserError(
                    f"the results of {width} × {height} px differ by {row['difference']} levels, allowed: "
                    f"{MAX_DIFFERENCE}; nothing is printed"
                )
            row["ratios"] = {key: row["strips"][key] / row["whole"][key] for key in ("seconds", "peak_bytes")}
    return row


def _difference(folder: Path) -> int:
    results = [np.load(folder / f"{way}.npy", mmap_mode="r") for way in WAYS]
    largest = 0
    for first in range(0, len(results[0]), 256):
        one, other = (result[first : first + 256].astype(np.int16) for result in results)
        largest = max(largest, int(np.abs(one - other).max()))
    return largest


def _measure(way: str, out: Path, width: int, height: int, architecture: str, threads: int) -> dict[str, float] | None:
    """Stylize one image in this process; None if the whole image does not fit."""
    import torch

    from fastnst.images import to_array, to_tensor
    from fastnst.inference import stylize, stylize_pixels, tensors
    from fastnst.memory import available_host_memory
    from fastnst.models.transform_net import TransformNet

    torch.set_num_threads(threads)
    net = TransformNet(architecture, generator=torch.Generator().manual_seed(0)).eval()
    needed = tensors._whole_bytes(1, height, width, torch.device("cpu"), torch.float32)
    if way == "whole" and needed > available_host_memory():
        return None
    # Strips for small images, too, which `stylize_pixels` would take as a whole.
    tensors._WHOLE_ON_CPU_BYTES = 0
    before = _resident("VmRSS")
    pixels = _waves(height, width)
    begin = time.perf_counter()
    result = stylize_pixels(net, pixels) if way == "strips" else to_array(stylize(net, to_tensor(pixels)))
    seconds = time.perf_counter() - begin
    measured = {"seconds": seconds, "peak_bytes": _resident("VmHWM") - before}
    np.save(out, result)
    return measured


def _waves(height: int, width: int) -> np.ndarray:
    """Return smooth colours with some waves, made a few rows at a time."""
    pixels = np.empty((height, width, 3), np.uint8)
    x = np.arange(width) / 400
    for row in range(height):
        y = row / 400
        for channel, wave in enumerate((np.sin(9 * x + 4 * y), np.cos(7 * y - 3 * x), np.sin(5 * x * y))):
            pixels[row, :, channel] = 127.5 + 120 * wave
    return pixels


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _parse(size: str) -> tuple[int, int]:
    try:
        width, height = (int(side) for side in size.split("x"))
    except ValueError:
        raise UserError(f"{size!r} is no size; give width x height, such as 1024x768") from None
    return width, height


def _rows_of(json_file: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    if json_file is None or not json_file.exists():
        return []
    report = json.loads(json_file.read_text("utf-8"))
    return list(report["rows"]) if report.get("settings") == settings else []


def _line(row: dict[str, Any]) -> str:
    def cells(way: dict[str, float] | None) -> str:
        return "does not fit" if way is None else f"{way['seconds']:7.1f} s {way['peak_bytes'] / 1e6:6.0f} MB"

    text = f"{row['width']:>6}x{row['height']:<5} {cells(row['strips']):>19} {cells(row['whole']):>19}"
    if row["whole"] is None:
        return text
    ratios = row["ratios"]
    return f"{text} {ratios['seconds']:6.2f} {ratios['peak_bytes']:6.2f}  {row['difference']}"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"{error}") from None
