"""`fastnst visualize …`: options and help; torch is imported inside the commands only."""

import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastnst.cli.path_checks import check_images, import_phase

if TYPE_CHECKING:
    import torch

    from fastnst.models.transform_net import TransformNet
    from fastnst.visualize.sheets.report import Report

log = logging.getLogger(__name__)

_PATH = click.Path(path_type=Path)
_images = click.argument("images", type=_PATH, nargs=-1, required=True, metavar="IMAGE...")
_size = click.option(
    "--size", type=int, metavar="PIXELS", help="Side of the center crop (default: 224, more for deep layers)."
)
_vgg = click.option("--vgg", default="auto", show_default=True, metavar="auto|random|FILE", help="VGG19 weights.")
_maps = click.option(
    "--maps", default="top:16", show_default=True, metavar="0,5,17-20|top:N|all", help="Maps by number or by strength."
)
_target = click.option(
    "--target", required=True, metavar="class:N|class:NAME|LAYER:MAP", help="A class, or a feature map, to explain."
)


def _common(function: Any) -> Any:
    """Add the options that all commands end with."""
    options = [
        click.option("--out", type=_PATH, required=True, metavar="FOLDER", help="Output folder."),
        click.option("--overwrite", is_flag=True, help="Also replace files that fastnst did not write."),
        click.option("--run", type=_PATH, metavar="RUN", help="Also write the sheets into that run's TensorBoard log."),
        click.option("--device", default="auto", metavar="cuda|cpu", help="Default: cuda if available."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.group()
def visualize() -> None:
    """Draw what the networks respond to, as contact sheets on one page.

    Each command writes PNG sheets and index.html into --out. Files of the same names that fastnst wrote are replaced. A
    foreign index.html is kept, and the command ends, unless --overwrite is given; where another foreign file, or an
    input, has a sheet's name, the sheet's gets a number.
    """


@visualize.command()
@_images
@click.option(
    "--layer", "layers", multiple=True, required=True, metavar="LAYER", help="conv1_1 to fc8; may be repeated."
)
@_maps
@click.option(
    "--activation", default="strongest", show_default=True, metavar="strongest|all|ROW,COL", help="In each map."
)
@_size
@_vgg
@_common
def deconvnet(
    images: tuple[Path, ...], layers: tuple[str, ...], out: Path, overwrite: bool, run: Path | None, **options: Any
) -> None:
    """Project maps of VGG19 back to pixels.

    Shows what in the image caused an activation (Zeiler & Fergus 2014).

    \b
    fastnst visualize deconvnet cat.jpg --layer relu3_4 --out seen
    fastnst visualize deconvnet cat.jpg --layer conv2_2 --layer conv3_4 --maps 0,5,17-20 --out seen
    """
    from fastnst.visualize.commands.options import check_vgg_command

    _check(out, run, images, overwrite=overwrite)
    check_vgg_command(layers, **{key: options[key] for key in ("vgg", "maps", "activation", "size")})
    with import_phase():
        from fastnst.visualize.commands.deconvnet import deconvnet_report

    _write(partial(deconvnet_report, images, layers, **options), out, run, images, overwrite=overwrite)


@visualize.command()
@click.argument("folder", type=_PATH)
@click.option("--layer", required=True, metavar="LAYER", help="conv1_1 to pool5.")
@_maps
@click.option("--count", type=int, default=9, show_default=True, help="Activations per map.")
@_size
@click.option(
    "--loader",
    default="pillow",
    show_default=True,
    type=click.Choice(["dali", "pillow"]),
    help="Decoder of the images.",
)
@_vgg
@_common
def top(folder: Path, layer: str, out: Path, overwrite: bool, run: Path | None, **options: Any) -> None:
    """Find each map's strongest activations in a FOLDER.

    Projects them back to pixels, beside the patches of the images that cause them.

    \b
    fastnst visualize top photos --layer relu3_4 --out seen
    """
    from fastnst.data.cache.format import is_cache
    from fastnst.data.folder import check_folder
    from fastnst.errors import DataError
    from fastnst.visualize.commands.options import check_vgg_command

    _check(out, run, (), overwrite=overwrite)
    if is_cache(check_folder(folder)):
        raise DataError(f"{folder} is a cache of training crops; give the folder that its images are in")
    check_vgg_command([layer], **{key: options[key] for key in ("vgg", "maps", "size")})
    with import_phase():
        from fastnst.visualize.commands.top import top_report

    _write(partial(top_report, folder, layer, **options), out, run, (), overwrite=overwrite)


@visualize.command()
@_images
@_target
@click.option("--method", default="plain", show_default=True, type=click.Choice(["plain", "guided", "smoothgrad"]))
@click.option("--samples", type=int, help="Noisy copies (smoothgrad; default 25).")
@click.option("--noise", type=float, help="Deviation in parts of the image's range (smoothgrad; default 0.15).")
@_size
@_vgg
@_common
def saliency(
    images: tuple[Path, ...], target: str, out: Path, overwrite: bool, run: Path | None, **options: Any
) -> None:
    """Show which pixels a class or a map is sensitive to.

    By the gradient of its score (Simonyan et al. 2013), optionally guided or averaged over noise.

    \b
    fastnst visualize saliency cat.jpg --target class:tabby --out seen
    fastnst visualize saliency cat.jpg --target relu3_4:17 --method smoothgrad --out seen
    """
    _check_target(images, target, out, run, overwrite=overwrite, **{key: options[key] for key in ("vgg", "size")})
    with import_phase():
        from fastnst.visualize.commands.saliency import saliency_report

    _write(partial(saliency_report, images, target, **options), out, run, images, overwrite=overwrite)


@visualize.command()
@_images
@_target
@click.option("--patch", type=int, default=32, show_default=True, metavar="PIXELS", help="Side of the occluder.")
@click.option("--stride", type=int, default=8, show_default=True, metavar="PIXELS", help="Step of the occluder.")
@click.option("--fill", default="grey", show_default=True, type=click.Choice(["grey", "blur"]))
@_size
@_vgg
@_common
def occlusion(
    images: tuple[Path, ...], target: str, out: Path, overwrite: bool, run: Path | None, **options: Any
) -> None:
    """Show how a class or a map suffers from covered parts.

    A square slides over the image, and the score is read at each position (Zeiler & Fergus 2014).

    \b
    fastnst visualize occlusion cat.jpg --target relu3_4:17 --out seen
    """
    _check_target(images, target, out, run, overwrite=overwrite, **{key: options[key] for key in ("vgg", "size")})
    with import_phase():
        from fastnst.visualize.commands.occlusion import occlusion_report

    _write(partial(occlusion_report, images, target, **options), out, run, images, overwrite=overwrite)


@visualize.command()
@click.argument("model", type=_PATH)
@_images
@click.option("--layer", "layers", multiple=True, metavar="LAYER", help="conv1 to out; may be repeated (default: all).")
@click.option("--maps", metavar="0,5,17-20|top:N|all", help="Also show single maps of the layers.")
@click.option("--checkpoint", type=int, metavar="STEP", help="Use that checkpoint of the run MODEL.")
@click.option("--size", type=int, metavar="PIXELS", help="Side of the center crop (default: 256).")
@_common
def transform(
    model: Path,
    images: tuple[Path, ...],
    layers: tuple[str, ...],
    checkpoint: int | None,
    out: Path,
    overwrite: bool,
    run: Path | None,
    **options: Any,
) -> None:
    """Follow images through a style MODEL.

    Layer by layer, from photo to stylized output. MODEL is a run directory or a model.safetensors.

    \b
    fastnst visualize transform runs/wave photo.jpg --out seen
    fastnst visualize transform runs/wave photo.jpg --checkpoint 1000 --run runs/wave --out seen
    """
    from fastnst.images import printable
    from fastnst.models.files.early_checks import check_style_model
    from fastnst.visualize.commands.options import check_transform_layers, parse_maps

    _check(out, run, images, overwrite=overwrite)
    check_transform_layers(layers)
    parse_maps("all" if options["maps"] is None else options["maps"])
    if checkpoint is None:
        check_style_model(model)
    with import_phase():
        from fastnst.visualize.commands.transform import transform_report

    name = printable(model) + ("" if checkpoint is None else f", step {checkpoint}")

    def load(device: "torch.device") -> "TransformNet":
        if checkpoint is None:
            from fastnst.models.style_model import load_style_model

            return load_style_model(model, device=device)
        from fastnst.training.run_dir.load_net import load_checkpoint_net

        return load_checkpoint_net(model, checkpoint).to(device)

    _write(
        partial(transform_report, load, name, images, layers, **options),
        out,
        run,
        images,
        overwrite=overwrite,
        step=checkpoint,
    )


def _check(out: Path, run: Path | None, images: Sequence[Path], *, overwrite: bool) -> None:
    """Check the paths, before torch is imported."""
    from fastnst.visualize.sheets.report import check_out

    check_out(out, overwrite=overwrite)
    if run is not None:
        from fastnst.training.run_dir.layout import check_run

        check_run(run)
    check_images(images)


def _check_target(
    images: Sequence[Path],
    target: str,
    out: Path,
    run: Path | None,
    *,
    overwrite: bool,
    vgg: str,
    size: int | None,
) -> None:
    """Check the target, then paths and weights, before torch is imported."""
    from fastnst.visualize.attribution.targets import parse_target
    from fastnst.visualize.commands.options import check_vgg_command

    chosen = parse_target(target)
    _check(out, run, images, overwrite=overwrite)
    check_vgg_command([chosen.layer], vgg=vgg, size=size, target=chosen)


def _write(
    make_report: Callable[[], "Report"],
    out: Path,
    run: Path | None,
    inputs: Sequence[Path],
    *,
    overwrite: bool,
    step: int | None = None,
) -> None:
    """Make the report, write it, and print the paths."""
    from fastnst.progress import phase
    from fastnst.visualize.sheets.report import as_markdown, write_report

    if run is not None:
        from fastnst.training.run_dir.load_net import steps_of_run

        step = steps_of_run(run) if step is None else step
    with phase("compute and draw"):
        report = make_report()
    command = shlex.join(["fastnst", *sys.argv[1:]])
    paths = write_report(report, out, command=command, inputs=inputs, overwrite=overwrite)
    if run is not None:
        from fastnst.errors import shell_quote
        from fastnst.run_log.writer import log_visualization

        sheets = {figure.tag: figure.image for figure in report.figures}
        log_visualization(run, sheets, step=step or 0, text=as_markdown(report, command))
        log.info("%d sheets are also in the TensorBoard log: fastnst tensorboard %s", len(sheets), shell_quote(run))
    for path in paths:
        # As bytes, to preserve names that are not UTF-8.
        click.echo(os.fsencode(path))
