"""`fastnst stylize`."""

import os
from pathlib import Path

import click

from fastnst.cli.path_checks import check_images, import_phase


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("images", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="IMAGE...")
# As text: the slash at the end of a folder's name says something, and `Path` drops it.
@click.option(
    "--out",
    type=click.Path(),
    required=True,
    metavar="IMAGE|FOLDER",
    help="Where to write; with a slash at its end: a folder.",
)
@click.option("--overwrite", is_flag=True, help="Also replace files that fastnst did not write.")
@click.option("--device", default="auto", metavar="cuda|cpu", help="Default: cuda where there is one.")
@click.option("--precision", default="auto", metavar="bf16|fp16|fp32", help="Default: fp32.")
def stylize(model: Path, images: tuple[Path, ...], out: str, overwrite: bool, device: str, precision: str) -> None:
    """Stylize images with a style MODEL: a run directory or a model.safetensors.

    An IMAGE may be a folder. The result has the size of its source, and the format of its suffix. Several go into a
    FOLDER under their own names; so does one if --out ends in a slash.

    Images that fastnst wrote are replaced; other files are kept unless --overwrite is given, inputs always. The command
    says so before it begins.
    """
    from fastnst.models.files.early_checks import check_style_model

    check_style_model(model)
    check_images(images)
    with import_phase():
        from fastnst.inference import stylize_files

    # Results are printed when all is done, but also when some image failed: the bar owns the terminal until then.
    written: list[Path] = []
    try:
        stylize_files(
            model, images, out, device=device, precision=precision, overwrite=overwrite, written=written.append
        )
    finally:
        for path in written:
            # As bytes, to preserve names that are not UTF-8.
            click.echo(os.fsencode(path))
