"""`fastnst data …`; NumPy and torch are imported inside the commands."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fastnst.data.manifest import Manifest, Rejection
    from fastnst.data.sampler import Fit

_folder = click.argument("folder", type=click.Path(path_type=Path))
_json = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


@click.group()
def data() -> None:
    """Check training images, or decode them once for many runs."""


@data.command()
@_folder
@_json
def check(folder: Path, as_json: bool) -> None:
    """Check every image of FOLDER as training does, and list rejected ones. Of a cache, verify all bytes."""
    from fastnst.data.cache.format import is_cache

    if is_cache(folder):
        _check_cache(folder, as_json)
        return
    manifest = _check_folder(folder)
    formats = Counter(entry.format for entry in manifest.images)
    if as_json:
        result = {"folder": str(folder), "accepted": len(manifest.images), "formats": formats}
        result |= {"rejected": _rejected(manifest.rejected)}
        click.echo(json.dumps(result, indent=2))
        return
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(formats.items()))
    click.echo(f"{len(manifest.images)} images accepted ({kinds}), {len(manifest.rejected)} refused")
    for item in manifest.rejected:
        click.echo(f"{item.path}: {item.reason}")


@data.command()
@_folder
@click.option(
    "--preset", metavar="NAME", help="Take size and fit from this preset of fastnst train (default: its default)."
)
@click.option("--size", type=click.IntRange(16, 2048), help="As data.image_size; default: that of the preset.")
@click.option(
    "--fit",
    type=click.Choice(["random_crop", "center_crop", "squash"]),
    help="As data.fit; default: that of the preset.",
)
@click.option("--out", type=click.Path(path_type=Path), metavar="CACHE", help="Default: caches/FOLDER-SIZE.")
@click.option("--rebuild", is_flag=True, help="Replace shards that are damaged, or made from other images.")
@click.option("--workers", type=click.IntRange(1, 256), help="Threads that decode; default: one for each core.")
@_json
def cache(
    folder: Path,
    preset: str | None,
    size: int | None,
    fit: "Fit | None",
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Decode and resize the images of FOLDER once, for `fastnst train --data CACHE` to read fast.

    Size and fit have to be those of the training, and come from its preset. After an interruption, the same command
    continues.

    \b
    fastnst data cache train2017 --out coco-256
    fastnst train --style wave.jpg --data coco-256 --out runs/wave
    """
    from fastnst.config import load_config
    from fastnst.data.cache.build import build_cache, check_place
    from fastnst.data.cache.format import cache_command, is_cache, read_head
    from fastnst.data.folder import check_folder
    from fastnst.errors import DataError, shell_quote
    from fastnst.progress import byte_count

    # The same sources as those of `train`: what it is given beside the preset is in the environment.
    trained = load_config(preset=preset).data
    size, fit = size or trained.image_size, fit or trained.fit
    if is_cache(folder):
        raise DataError(f"{folder} is a cache already; give the folder that its images are in")
    if out is None:
        out = Path("caches") / f"{Path(os.path.abspath(folder)).name}-{size}"  # noqa: PTH100
    check_folder(folder)
    check_place(out)
    old = read_head(out)
    if old is not None and (old.size, old.fit) != (size, fit) and not options["rebuild"]:
        raise DataError(
            f"{out} is a cache of {old.size} px, {old.fit}, and {size} px, {fit} are wanted; replace it with: "
            f"{cache_command(folder, size, fit, out)} --rebuild, or choose another --out"
        )
    built = build_cache(_check_folder(folder), out, size=size, fit=fit, **options)
    made = built.cache
    if as_json:
        result = {"cache": str(out), "size": size, "fit": made.fit, "pictures": len(made.images), "bytes": made.bytes}
        result |= {"shards": len(made.shards), "shards_kept": built.shards_kept, "rejected": _rejected(made.rejected)}
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(out)
    command = ["fastnst", "train", "--data", shell_quote(out)] + (["--preset", preset] if preset else [])
    for key, value, default in (("image_size", size, trained.image_size), ("fit", fit, trained.fit)):
        command += [] if value == default else ["--set", f"data.{key}={value}"]
    click.echo(
        f"{len(made.images)} images of {size} px ({made.fit}), {len(made.rejected)} refused, "
        f"{byte_count(made.bytes)} in {len(made.shards)} shards; train with: {' '.join(command)} --style IMAGE",
        err=True,
    )


def _check_folder(folder: Path) -> "Manifest":
    from fastnst.data.folder import check_folder
    from fastnst.data.manifest import build_manifest
    from fastnst.progress import counted

    check_folder(folder)
    with counted("check images", "images") as progress:
        return build_manifest(folder, progress=progress, allow_uniform=False)


def _check_cache(folder: Path, as_json: bool) -> None:
    from fastnst.data.cache.format import read_cache
    from fastnst.data.cache.verify import describe_damage, verify
    from fastnst.errors import DataError
    from fastnst.progress import counted

    cache = read_cache(folder)
    with counted("verify cache", "MB", scale=1e6) as progress:
        damaged = verify(cache, skip_verified=False, progress=progress)
    if as_json:
        formats = Counter(image.entry.format for image in cache.images)
        result = {"folder": str(folder), "accepted": len(cache.images), "formats": formats}
        result |= {"size": cache.size, "fit": cache.fit, "shards": len(cache.shards), "damaged": damaged}
        click.echo(json.dumps(result | {"rejected": _rejected(cache.rejected)}, indent=2))
    if damaged:
        raise DataError(describe_damage(cache, damaged))
    if not as_json:
        click.echo(
            f"{len(cache.images)} images of {cache.size} px ({cache.fit}) in {len(cache.shards)} shards, all "
            f"intact; {len(cache.rejected)} were refused"
        )


def _rejected(items: "Iterable[Rejection]") -> list[dict[str, str]]:
    return [{"path": item.path, "reason": item.reason} for item in items]
