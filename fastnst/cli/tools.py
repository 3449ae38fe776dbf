"""`fastnst tensorboard`, `demo` and `doctor`."""

import os
import sys
from pathlib import Path

import click

from fastnst.cli.train import stop_request


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--port", type=int, default=6006, show_default=True)
@click.option("--host", default="localhost", show_default=True, help="Anything else lets other machines look in.")
def tensorboard(run: Path, port: int, host: str) -> None:
    """Open the TensorBoard log of a RUN (or of a folder of runs) on localhost."""
    from fastnst.errors import DataError

    if not _holds_log(run):
        raise DataError(f"{run} holds no TensorBoard log; give a run directory that fastnst train has written")
    # TensorBoard takes this process's place, so that signals and its exit code are its own. It keeps 10 images per
    # tag unless told otherwise, and the sliders want them all. Without its data server it follows only the newest file
    # of a run; `visualize --run` writes one of its own beside that of a training that goes on.
    keep = "images=1000,histograms=1000,scalars=10000,text=1000"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--samples_per_plugin", keep]
    os.execv(sys.executable, [*command, "--reload_multifile", "true", "--host", host, "--port", str(port)])


def _holds_log(folder: Path) -> bool:
    """Return whether TensorBoard finds an event file: it follows links, and takes any name with `tfevents`."""
    seen = set()
    for inside, subfolders, names in os.walk(folder, followlinks=True):
        status = Path(inside).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if any("tfevents" in name and Path(inside, name).is_file() for name in names):
            return True
    return False


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, metavar="RUN")
@click.option("--vgg", default="auto", metavar="auto|random|FILE", help="auto falls back to random without a network.")
@click.option("--steps", type=int, default=None, help="Steps to train.")
def demo(out: Path, vgg: str, steps: int | None) -> None:
    """Train a small style on images that ship with a dependency, and stylize one of them."""
    from fastnst.demo import run_demo

    image, model = run_demo(out, vgg=vgg, steps=steps, stop=stop_request())
    click.echo(f"stylized image   {image}")
    click.echo(f"style model      {model}")
    click.echo(f"TensorBoard log  {out}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def doctor(as_json: bool) -> None:
    """Check this machine and the installation, and say how to mend faults; for bug reports.

    Takes some seconds and no network. Exit code: 0 if nothing failed, else that of the first check that did:
    1 the installation, 3 weights or storage, 5 device or memory.
    """
    import json

    from fastnst.doctor import examine

    report = examine()
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        colours = {} if os.environ.get("NO_COLOR") else {"PASS": "green", "WARN": "yellow", "FAIL": "red"}
        for status, line in report.lines():
            # Colours reach a terminal only: `echo` takes them out elsewhere.
            click.echo(click.style(line[:4], fg=colours.get(status)) + line[4:] if status else line)
    sys.exit(report.exit_code)
