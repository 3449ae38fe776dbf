"""`fastnst train`: options, the configuration that they make, and what to resume."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastnst.cli.path_checks import check_run, import_phase

if TYPE_CHECKING:
    from fastnst.config import Config
    from fastnst.training.distributed.environment import DistEnv
    from fastnst.training.signals import StopRequest

log = logging.getLogger(__name__)

_LONGEST_NAME = 200
"""Bytes of a file's name that any file system takes."""


@click.command()
@click.option(
    "--style",
    "styles",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="IMAGE",
    help="Style image; train several at once by repeating --style.",
)
@click.option("--data", type=click.Path(path_type=Path), metavar="FOLDER", help="Photos to train on, or a cache.")
@click.option("--preset", metavar="NAME", help="hwalsuklee (the default), lengstrom, johnson or vgg-conv3.")
@click.option("--config", "file", type=click.Path(path_type=Path), metavar="FILE.toml", help="Configuration file.")
@click.option("--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE", help="Set one configuration key.")
@click.option("--vgg", metavar="auto|random|FILE", help="VGG19 weights; auto finds or downloads torchvision's.")
@click.option("--loader", metavar="dali|pillow", help="What decodes and resizes the images.")
@click.option("--device", metavar="cuda|cpu", help="Default: cuda where there is one.")
@click.option("--precision", metavar="bf16|fp16|fp32", help="Default: bf16 on CUDA, fp32 on a CPU.")
@click.option("--steps", type=int, help="Steps to train (default: two passes over the data).")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Run directory (default: runs/STYLE), or the folder of several.",
)
@click.option("--resume", is_flag=True, help="Continue the run in --out.")
@click.option("--allow-changes", is_flag=True, help="With --resume: continue even if options or images changed.")
@click.option("--dry-run", is_flag=True, help="Print configuration, data, memory and disk, and stop.")
@click.option("--profile", type=click.IntRange(min=1), metavar="N", help="Trace N steps for Perfetto or TensorBoard.")
def train(
    out: Path | None,
    resume: bool,
    allow_changes: bool,
    dry_run: bool,
    styles: tuple[Path, ...],
    profile: int | None,
    **options: Any,
) -> None:
    """Train a style, or several at once.

    Ctrl-C finishes the step, saves a checkpoint and prints how to resume.

    \b
    fastnst train --style wave.jpg --data train2017 --out runs/wave
    fastnst train --resume --out runs/wave
    fastnst train --style wave.jpg --style scream.jpg --data train2017 --out runs/both
    """
    from fastnst.errors import shell_quote
    from fastnst.training.distributed.environment import DistEnv

    dist_env = DistEnv.from_environ()
    if dist_env.world_size > 1:
        # When a process ends, torch prints pages about broken connections; the run's own message is one line.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with _on_local_rank_zero(dist_env):
        if allow_changes and not resume:
            raise click.UsageError("--allow-changes is for a run that goes on; give --resume with it")
        config, several, out = _plan(styles, out, resume=resume, **options)
        check_run(config, several, out, dist_env, resume=resume, allow_changes=allow_changes)
    if dry_run:
        if dist_env.rank == 0:
            from fastnst.cli.dry_run import print_plan

            with import_phase():
                import torch  # noqa: F401
            print_plan(config, several, out, dist_env, resume=resume, allow_changes=allow_changes)
        return

    if profile is not None:
        # The profiler logs to stderr, and reads its level when torch is imported.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with _on_local_rank_zero(dist_env), import_phase(dist_env.rank):
        from fastnst.training import train as training

    resuming = {"resume": resume, "allow_changes": allow_changes}
    models = training.train(config, out, styles=several, **resuming, stop=stop_request(), profile=profile)
    if dist_env.rank:
        return
    for model in models:
        click.echo(f"style model      {model}")
    click.echo(f"TensorBoard log  {out}")
    shown, used = shell_quote(out), shell_quote(models[0].parent)
    log.info("look at it: fastnst tensorboard %s; use it: fastnst stylize %s IMAGE --out IMAGE", shown, used)


def _plan(
    given: tuple[Path, ...], out: Path | None, *, resume: bool, **options: Any
) -> tuple["Config", dict[str, Path] | None, Path]:
    """Return the configuration, the styles by name if there are several, and the output folder."""
    from fastnst.training.run_dir.style_folder import STYLES_NAME, style_names

    styles = style_names([style.absolute() for style in given])
    is_saved = resume and options["file"] is None
    if resume:
        if out is None:
            raise click.UsageError("--resume needs --out RUN, the directory of the run to go on with")
        styles, configuration = _saved_run(out, styles)
        if is_saved:
            options["file"] = configuration
    config = _load_config(style=next(iter(styles.values()), None), is_saved=is_saved, **options)
    if out is None:
        if config.style.image is None:
            raise click.UsageError("no style image; give one with --style IMAGE")
        out = _default_out(list(styles) or [config.style.image.stem])
    is_one = len(styles) < 2 and not (resume and (out / STYLES_NAME).is_file())
    return config, None if is_one else styles, out


def _load_config(
    *,
    style: Path | None,
    data: Path | None,
    preset: str | None,
    file: Path | None,
    is_saved: bool,
    assignments: tuple[str, ...],
    **keys: Any,
) -> "Config":
    from fastnst.config import load_config

    names = {"vgg": "loss.vgg", "loader": "data.loader", "device": "train.device"}
    names |= {"precision": "train.precision", "steps": "train.steps"}
    options = {names[key]: value for key, value in keys.items()}
    # Paths are resolved here: a run may be resumed from another working directory.
    options |= {"style.image": style and style.absolute(), "data.folder": data and data.absolute()}
    if options["loss.vgg"] not in (None, "auto", "random"):
        options["loss.vgg"] = str(Path(options["loss.vgg"]).absolute())
    return load_config(preset=preset, file=file, is_saved=is_saved, assignments=assignments, options=options)


@contextlib.contextmanager
def _on_local_rank_zero(dist_env: "DistEnv") -> Iterator[None]:
    """Report a wrong command line or file once per machine: all its processes find the same."""
    from fastnst.errors import StoppedBySignal, UserError

    try:
        yield
    except (UserError, StoppedBySignal, click.ClickException) as error:
        if dist_env.local_rank == 0:
            raise
        sys.exit(error.exit_code)


def _saved_run(out: Path, given: dict[str, Path]) -> tuple[dict[str, Path], Path]:
    """Return the styles of a run to resume, and a configuration file that it was begun with."""
    from fastnst.training.run_dir.layout import CONFIG_NAME, saved_config
    from fastnst.training.run_dir.style_folder import STYLES_NAME, saved_styles

    begun = saved_styles(out)
    if begun is None:
        if len(given) < 2:
            saved_config(out)
        return given, out / CONFIG_NAME
    configurations = {name: out / name / CONFIG_NAME for name in begun if (out / name / CONFIG_NAME).is_file()}
    if not configurations:
        raise click.UsageError(f"none of the runs that {out / STYLES_NAME} names has begun; start without --resume")
    # A run that was resumed alone may have another style image since.
    begun |= {name: saved_config(out / name).style.image or begun[name] for name in configurations}
    return given or begun, next(iter(configurations.values()))


def _default_out(names: list[str]) -> Path:
    name = "+".join(names)
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise click.UsageError(f"{len(names)} styles want a folder for their runs; give one with --out")
    return Path("runs") / name


def stop_request() -> "StopRequest | None":
    """Return that of `main`; None where the command was called without it."""
    from fastnst.training.signals import StopRequest

    return click.get_current_context().find_object(StopRequest)
