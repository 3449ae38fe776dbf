"""`fastnst visualize …`: options and help; torch and all that needs it is imported inside the commands."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from fastnst.models.transform_net import TransformNet
    from fastnst.visualize.sheets.report import Report

_PATH = click.Path(path_type=Path)
_images = click.argument("images", type=_PATH, nargs=-1, required=True, metavar="IMAGE...")
_size = click.option(
    "--size", type=int, metavar="PIXELS", help="Side of the middle square (default: 224, deeper more)."
)
_vgg = click.option("--vgg", default="auto", show_default=True, metavar="auto|random|FILE", help="VGG19 weights.")
_maps = click.option(
    "--maps", default="top:16", show_default=True, metavar="0,5,17-20|top:N|all", help="Maps by number or by strength."
)
_target = click.option(
    "--target", required=True, metavar="class:N|class:NAME|LAYER:MAP", help="What to explain: a class, or any map."
)


def _common(function: Any) -> Any:
    """Options that all commands end with."""
    options = [
        click.option(
            "--out", type=_PATH, required=True, metavar="FOLDER", help="Where to write; its files are replaced."
        ),
        click.option("--run", type=_PATH, metavar="RUN", help="Write the sheets into that run's TensorBoard log, too."),
        click.option("--device", default="auto", metavar="cuda|cpu", help="Default: cuda where there is one."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.group()
def visualize() -> None:
    """See what the networks see: contact sheets, and a page that shows them side by side.

    Each command writes PNG sheets and index.html into --out. Files of the same names are replaced, others stay.
    """


@visualize.command()
@_images
@click.option(
    "--layer", "layers", multiple=True, required=True, metavar="LAYER", help="conv1_1 to fc8; may be repeated."
)
@_maps
@click.option(
    "--activation", default="strongest", show_default=True, metavar="strongest|all|ROW,COL", help="What of each map."
)
@_size
@_vgg
@_common
def deconvnet(images: tuple[Path, ...], layers: tuple[str, ...], out: Path, run: Path | None, **options: Any) -> None:
    """Project maps of VGG19 back to pixels.

    What in the image caused an activation (Zeiler & Fergus 2014), seen by the network's own way back.

    \b
    fastnst visualize deconvnet cat.jpg --layer relu3_4 --out seen
    fastnst visualize deconvnet cat.jpg --layer conv2_2 --layer conv3_4 --maps 0,5,17-20 --out seen
    """
    from fastnst.visualize.commands import commands

    _make(lambda: commands.deconvnet(images, layers, notify=_notify, **options), out, run, images)


@visualize.command()
@click.argument("folder", type=_PATH)
@click.option("--layer", required=True, metavar="LAYER", help="conv1_1 to pool5.")
@_maps
@click.option("--count", type=int, default=9, show_default=True, help="Activations per map.")
@_size
@click.option("--loader", default="pillow", show_default=True, metavar="dali|pillow", help="What decodes the images.")
@_vgg
@_common
def top(folder: Path, layer: str, out: Path, run: Path | None, **options: Any) -> None:
    """Find what excites each map most in a FOLDER.

    The strongest activations among all its images, projected back to pixels, beside what they see.

    \b
    fastnst visualize top photos --layer relu3_4 --out seen
    """
    from fastnst.visualize.commands import commands

    _make(lambda: commands.top(folder, layer, notify=_notify, **options), out, run, ())


@visualize.command()
@_images
@_target
@click.option("--method", default="plain", show_default=True, metavar="plain|guided|smoothgrad")
@click.option("--samples", type=int, help="Noisy copies (smoothgrad; default 25).")
@click.option("--noise", type=float, help="Deviation in parts of the image's range (smoothgrad; default 0.15).")
@_size
@_vgg
@_common
def saliency(images: tuple[Path, ...], target: str, out: Path, run: Path | None, **options: Any) -> None:
    """Show which pixels a class or a map reacts to.

    By the gradient of its score (Simonyan et al. 2013), guided or averaged over noise if asked.

    \b
    fastnst visualize saliency cat.jpg --target class:tabby --out seen
    fastnst visualize saliency cat.jpg --target relu3_4:17 --method smoothgrad --out seen
    """
    from fastnst.visualize.commands import commands

    _make(lambda: commands.saliency(images, target, notify=_notify, **options), out, run, images)


@visualize.command()
@_images
@_target
@click.option("--patch", type=int, default=32, show_default=True, metavar="PIXELS", help="Side of the occluder.")
@click.option("--stride", type=int, default=8, show_default=True, metavar="PIXELS", help="From one place to the next.")
@click.option("--fill", default="grey", show_default=True, metavar="grey|blur")
@_size
@_vgg
@_common
def occlusion(images: tuple[Path, ...], target: str, out: Path, run: Path | None, **options: Any) -> None:
    """Show what a class or a map loses if covered.

    A square slides over the image, and the score is read at each place (Zeiler & Fergus 2014).

    \b
    fastnst visualize occlusion cat.jpg --target relu3_4:17 --out seen
    """
    from fastnst.visualize.commands import commands

    _make(lambda: commands.occlusion(images, target, notify=_notify, **options), out, run, images)


@visualize.command()
@click.argument("model", type=_PATH)
@_images
@click.option("--layer", "layers", multiple=True, metavar="LAYER", help="conv1 to out; may be repeated (default: all).")
@click.option("--maps", metavar="0,5,17-20|top:N|all", help="Show single maps of the layers, too.")
@click.option("--checkpoint", type=int, metavar="STEP", help="The weights of that step of the run MODEL.")
@click.option("--size", type=int, metavar="PIXELS", help="Side of the middle square (default: 256).")
@_common
def transform(
    model: Path,
    images: tuple[Path, ...],
    layers: tuple[str, ...],
    checkpoint: int | None,
    out: Path,
    run: Path | None,
    **options: Any,
) -> None:
    """Follow images through a style MODEL.

    Layer by layer, from photo to painting. MODEL is a run directory or a model.safetensors.

    \b
    fastnst visualize transform runs/wave photo.jpg --out seen
    fastnst visualize transform runs/wave photo.jpg --checkpoint 1000 --run runs/wave --out seen
    """
    from fastnst.images import printable
    from fastnst.visualize.commands import commands

    name = printable(model) + ("" if checkpoint is None else f", step {checkpoint}")

    def load(device: "torch.device") -> "TransformNet":
        if checkpoint is None:
            from fastnst.models.style_model import load_style_model

            return load_style_model(model, device=device)
        from fastnst.training.run_dir.load_net import load_checkpoint_net

        return load_checkpoint_net(model, checkpoint).to(device)

    _make(lambda: commands.transform(load, name, images, layers, **options), out, run, images, step=checkpoint)


def _make(
    work: Callable[[], "Report"], out: Path, run: Path | None, inputs: Sequence[Path], *, step: int | None = None
) -> None:
    """Check where the results go, do the work, write all of it, and print what was written."""
    from fastnst.visualize.sheets.report import as_markdown, check_out, write_report

    check_out(out)
    if run is not None:
        from fastnst.training.run_dir.load_net import check_run, steps_of_run

        check_run(run)
        step = steps_of_run(run) if step is None else step
    report = work()
    command = shlex.join(["fastnst", *sys.argv[1:]])
    paths = write_report(report, out, command=command, inputs=inputs)
    if run is not None:
        from fastnst.run_log.writer import log_visualization

        sheets = {sheet.tag: sheet.image for sheet in report.sheets}
        log_visualization(run, sheets, step=step or 0, text=as_markdown(report, command))
        _notify(f"{len(sheets)} sheets are in the TensorBoard log, too: fastnst tensorboard {shlex.quote(str(run))}")
    for path in paths:
        # As bytes: a name that is not UTF-8 must come out as it is.
        click.echo(os.fsencode(path))


def _notify(text: str) -> None:
    click.echo(text, err=True)
