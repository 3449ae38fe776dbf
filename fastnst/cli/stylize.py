"""`fastnst stylize`."""

from pathlib import Path

import click

from fastnst.cli.path_checks import check_images, import_phase


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("images", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="IMAGE...")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="IMAGE|FOLDER", help="Where to write.")
@click.option("--device", default="auto", metavar="cuda|cpu", help="Default: cuda where there is one.")
@click.option("--precision", default="auto", metavar="bf16|fp16|fp32", help="Default: fp32.")
def stylize(model: Path, images: tuple[Path, ...], out: Path, device: str, precision: str) -> None:
    """Stylize images with a style MODEL: a run directory or a model.safetensors.

    An IMAGE may be a folder. The result has the size of its source, and the format of its suffix.
    """
    from fastnst.models.early_checks import check_style_model

    check_style_model(model)
    check_images(images)
    with import_phase():
        from fastnst.inference import stylize_files

    # Results are printed when all is done, but also when some image failed: the bar owns the terminal until then.
    written: list[Path] = []
    try:
        stylize_files(model, images, out, device=device, precision=precision, written=written.append)
    finally:
        for path in written:
            click.echo(path)
