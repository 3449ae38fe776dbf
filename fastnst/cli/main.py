"""The command line. torch and everything that needs it are imported inside the commands: `--help` stays instant."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastnst.cli.data import data
from fastnst.cli.visualize import visualize

if TYPE_CHECKING:
    from fastnst.config import Config
    from fastnst.training.distributed.environment import DistEnv
    from fastnst.training.signals import StopRequest

_LONGEST_MESSAGE = 4000
_LONGEST_NAME = 200
"""Bytes of a file's name that any file system takes."""
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


def main() -> None:
    """Entry point: runs a command; errors that users can mend become one message and an exit code, no traceback."""
    from fastnst.errors import StoppedBySignal, UserError
    from fastnst.training.signals import StopRequest

    # From here on, and not only while training: importing torch and checking a folder take long enough to be stopped.
    stop = StopRequest()
    try:
        with stop.installed():
            cli.main(standalone_mode=False, obj=stop)
    except click.Abort:
        _fail("interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (UserError, StoppedBySignal) as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of stdout has gone (`fastnst … | head`): nothing is left to say, and nowhere to say it.
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        where = f" {error.filename}" if error.filename else ""
        _fail(f"the storage refuses{where}: {error.strerror}; free some space or choose another folder", 3)


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="fastnst")
def cli() -> None:
    """Train feed-forward style-transfer networks at the speed of the GPU, and see what they learn.

    Exit codes: 0 done, 2 usage, 3 bad data, weights or storage, 4 training diverged, 5 no device or memory,
    128+n stopped by signal n.
    """


cli.add_command(data)
cli.add_command(visualize)

_train_options: list[Callable[[Any], Any]] = [
    click.option(
        "--style",
        "styles",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="IMAGE",
        help="The painting to learn; several at once, each given by --style, cost less than one after the other.",
    ),
    click.option("--data", type=click.Path(path_type=Path), metavar="FOLDER", help="Photos to train on, or a cache."),
    click.option("--preset", metavar="NAME", help="hwalsuklee (the default), lengstrom, johnson or vgg-conv3."),
    click.option("--config", "file", type=click.Path(path_type=Path), metavar="FILE.toml", help="Configuration file."),
    click.option("--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE", help="Set one configuration key."),
    click.option("--vgg", metavar="auto|random|FILE", help="VGG19 weights; auto finds or downloads torchvision's."),
    click.option("--loader", metavar="dali|pillow", help="What decodes and resizes the images."),
    click.option("--device", metavar="cuda|cpu", help="Default: cuda where there is one."),
    click.option("--precision", metavar="bf16|fp16|fp32", help="Default: bf16 on CUDA, fp32 on a CPU."),
    click.option("--steps", type=int, help="Steps to train (default: two passes over the data)."),
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        metavar="RUN",
        help="Run directory (default: runs/STYLE), or the folder of several.",
    ),
    click.option("--resume", is_flag=True, help="Go on with the run in --out."),
    click.option("--allow-changes", is_flag=True, help="With --resume: go on though options or images changed."),
    click.option("--dry-run", is_flag=True, help="Print configuration, data, memory and disk, and stop."),
]


def _with_train_options(function: Any) -> Any:
    for option in reversed(_train_options):
        function = option(function)
    return function


@cli.command()
@_with_train_options
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
    """Train a style, or several at once. Ctrl-C finishes the step, saves, and says how to go on.

    \b
    fastnst train --style wave.jpg --data train2017 --out runs/wave
    fastnst train --resume --out runs/wave
    fastnst train --style wave.jpg --style scream.jpg --data train2017 --out runs/both
    """
    from fastnst.training.distributed.environment import DistEnv
    from fastnst.training.run_dir.style_folder import style_names

    dist_env = DistEnv.from_environ()
    if dist_env.world_size > 1:
        # Of a connection that breaks when a process ends, torch prints pages; the run says in a line what it means.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with _said_once(dist_env):
        if allow_changes and not resume:
            raise click.UsageError("--allow-changes is for a run that goes on; give --resume with it")
        together = style_names([style.absolute() for style in styles])
        if resume:
            if out is None:
                raise click.UsageError("--resume needs --out RUN, the directory of the run to go on with")
            together, configuration = _begun(out, together)
            if options["file"] is None:
                options["file"] = configuration
        config = _train_config(style=next(iter(together.values()), None), **options)
        if out is None:
            if config.style.image is None:
                raise click.UsageError("no style image; give one with --style IMAGE")
            out = _default_out(list(together) or [config.style.image.stem])
        one = len(together) < 2 and not (resume and _is_folder_of_styles(out))
    if dry_run:
        if dist_env.rank == 0:
            from fastnst.cli.dry_run import print_plan

            print_plan(config, {} if one else together, out, dist_env, resume, allow_changes, _notify)
        return

    if profile is not None:
        # The profiler announces itself on stderr, and takes the limit when torch is imported.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with _said_once(dist_env):
        from fastnst.training import trainer

    common: dict[str, Any] = {"resume": resume, "allow_changes": allow_changes, "profile": profile}
    common |= {"notify": _notify, "stop": _stop_request()}
    models = [trainer.train(config, out, **common)] if one else trainer.train_styles(config, together, out, **common)
    if dist_env.rank:
        return
    for model in models:
        click.echo(f"style model      {model}")
    click.echo(f"TensorBoard log  {out}")
    _notify(f"look at it: fastnst tensorboard {out}; use it: fastnst stylize {models[0].parent} IMAGE --out IMAGE")


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("images", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="IMAGE...")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="IMAGE|FOLDER", help="Where to write.")
@click.option("--device", default="auto", metavar="cuda|cpu", help="Default: cuda where there is one.")
@click.option("--precision", default="auto", metavar="bf16|fp16|fp32", help="Default: fp32.")
def stylize(model: Path, images: tuple[Path, ...], out: Path, device: str, precision: str) -> None:
    """Paint images with a style MODEL: a run directory or a model.safetensors.

    A IMAGE may be a folder. The result has the size of its source, and the format of its suffix.
    """
    from fastnst.inference import stylize_files

    # Results are printed when all is done, but also when some image failed: the bar owns the terminal until then.
    written: list[Path] = []
    try:
        stylize_files(model, images, out, device=device, precision=precision, written=written.append)
    finally:
        for path in written:
            click.echo(path)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--port", type=int, default=6006, show_default=True)
@click.option("--host", default="localhost", show_default=True, help="Anything else lets other machines look in.")
def tensorboard(run: Path, port: int, host: str) -> None:
    """Open the TensorBoard log of a RUN (or of a folder of runs) on localhost."""
    from fastnst.errors import DataError

    if not any(run.rglob("events.out.tfevents.*")):
        raise DataError(f"{run} holds no TensorBoard log; give a run directory that fastnst train has written")
    # TensorBoard takes this process's place, so that signals and its exit code are its own. It keeps 10 images per
    # tag unless told otherwise, and the sliders want them all. Without its data server it follows only the newest file
    # of a run; `visualize --run` writes one of its own beside that of a training that goes on.
    keep = "images=1000,histograms=1000,scalars=10000,text=1000"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--samples_per_plugin", keep]
    os.execv(sys.executable, [*command, "--reload_multifile", "true", "--host", host, "--port", str(port)])


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, metavar="RUN")
@click.option("--vgg", default="auto", metavar="auto|random|FILE", help="auto falls back to random without a network.")
@click.option("--steps", type=int, default=None, help="Steps to train.")
def demo(out: Path, vgg: str, steps: int | None) -> None:
    """Train a small style on images that ship with a dependency, and paint one with it."""
    from fastnst.demo import run_demo

    result = run_demo(out, vgg=vgg, steps=steps, notify=_notify, stop=_stop_request())
    click.echo(f"stylised image {result.image}")
    click.echo(f"style model      {result.model}")
    click.echo(f"TensorBoard log  {out}")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def doctor(as_json: bool) -> None:
    """Check this machine and the installation, and say how to mend what is wrong; to be pasted into a bug report.

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


def _train_config(
    *,
    style: Path | None,
    data: Path | None,
    preset: str | None,
    file: Path | None,
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
    return load_config(preset=preset, file=file, assignments=assignments, options=options)


@contextlib.contextmanager
def _said_once(dist_env: "DistEnv") -> Iterator[None]:
    """What is wrong with a command line or a file is the same in all processes of a machine: the first one says it."""
    from fastnst.errors import StoppedBySignal, UserError

    try:
        yield
    except (UserError, StoppedBySignal, click.ClickException) as error:
        if dist_env.local_rank == 0:
            raise
        sys.exit(error.exit_code)


def _begun(out: Path, given: dict[str, Path]) -> tuple[dict[str, Path], Path]:
    """The styles of a run to go on with, and a configuration file that it was begun with."""
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
    # An image may have been given to one of the runs anew, by resuming it alone.
    begun |= {name: saved_config(out / name).style.image or begun[name] for name in configurations}
    return given or begun, next(iter(configurations.values()))


def _is_folder_of_styles(out: Path) -> bool:
    from fastnst.training.run_dir.style_folder import STYLES_NAME

    return (out / STYLES_NAME).is_file()


def _default_out(names: list[str]) -> Path:
    name = "+".join(names)
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise click.UsageError(f"{len(names)} styles want a folder for their runs; give one with --out")
    return Path("runs") / name


def _stop_request() -> "StopRequest | None":
    """That of `main`; None where the command was called without it."""
    from fastnst.training.signals import StopRequest

    return click.get_current_context().find_object(StopRequest)


def _notify(text: str) -> None:
    click.echo(_harmless(text), err=True)


def _fail(message: str, code: int) -> None:
    click.echo(_harmless(f"fastnst: {message}"), err=True)
    sys.exit(code)


def _harmless(text: str) -> str:
    """What files say of themselves is part of some messages: no screenful after screenful, nothing for a terminal."""
    short = text if len(text) <= _LONGEST_MESSAGE else text[: _LONGEST_MESSAGE - 1] + "…"
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in short)
