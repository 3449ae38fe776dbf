"""The entry to training. In this order, each process of a run

1. joins the process group (torchrun's, or itself alone) and chooses its device;
2. checks whether the run directories may hold this run, and makes nothing;
3. reads images, style images and VGG19, local rank 0 first, so that the others find its caches;
4. checks that all ranks were given the same;
5. locks the run directories (rank 0) and checks them again: another process may have used them meanwhile;
6. with `resume`, loads the newest valid checkpoints;
7. trains: `Trainer.train`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from fastnst.config import Config
from fastnst.data.replacements import REJECTED_NAME, ReadFailure, read_failures
from fastnst.errors import DataError
from fastnst.storage import lock_run
from fastnst.training import determinism
from fastnst.training.distributed.environment import DistEnv, check_divisible
from fastnst.training.distributed.process_group import ProcessGroup, check_equal, choose_device, open_process_group
from fastnst.training.distributed.synced_batches import broadcast_failures
from fastnst.training.divergence import explained_storage_errors
from fastnst.training.inputs import Inputs, read_inputs, read_style, resolve
from fastnst.training.memory.advice import check_style_fits, explained_memory_errors, warn_of_shortage
from fastnst.training.monitoring.profiler import check_steps
from fastnst.training.run_dir.checkpoint import checkpoint_steps
from fastnst.training.run_dir.resume import provenance
from fastnst.training.run_dir.style_folder import MultiStyleDir, run_configs, validate_run_dirs
from fastnst.training.signals import StopRequest
from fastnst.training.trainer import Trainer


def train(
    config: Config,
    out: Path | str,
    *,
    styles: Mapping[str, Path] | None = None,
    resume: bool = False,
    allow_changes: bool = False,
    stop: StopRequest | None = None,
    profile: int | None = None,
) -> list[Path]:
    """Train one style, or several on one stream of images, with one pass of φ over their content.

    Each of several styles has its own net and run directory, `out/NAME`, just as if it had been trained alone. If they
    are at different steps, those ahead wait. Below torchrun each process calls this and takes its share of the batch.

    Args:
        config: the resolved configuration with `data.folder` set, and `style.image` unless `styles` is given.
        out: the run directory, or with `styles` their folder; new or empty unless `resume` is set.
        styles: name → image, see `style_names`; they replace `style.image`. None: train the style of `config`.
        resume: continue from the newest valid checkpoint of each style.
        allow_changes: with `resume`, accept another configuration, images, style, VGG19 or number of processes than
            those of the checkpoint. Each change is logged, and saved in `config.toml`.
        stop: polled after each step; when a signal has come, the run is saved and left.
        profile: steps to trace, if any; see `StepProfile`.

    Returns:
        The paths of the style models: one per style, in the order of `styles`.

    Raises:
        UserError: `out` holds another run, other styles, or a run with another configuration; or `profile` is below 1.
        DataError: images, style or weights cannot be used, or differ from those of the run to resume.
        StorageError: a file or a line of the log cannot be written; the run ends as if killed.
        DivergedError: a value is not finite, or too many steps in a row were skipped.
        DeviceError: no such device, or too little memory on it, with what would fit.
        StoppedBySignal: after the save that `stop` asked for.
        SystemExit: another process of the run has raised one of these.
    """
    check_steps(profile)
    dist_env, out, stop = DistEnv.from_environ(), Path(out), stop or StopRequest()
    style_dir = MultiStyleDir(out, styles) if styles else None
    configs = run_configs(config, styles, out) if styles else {out: config}
    runs = list(configs)
    with open_process_group(dist_env, stop, lambda: _resume_hint(runs)) as group:
        choose_device(config.train.device, dist_env)
        configs = {run: resolve(own)[0] for run, own in configs.items()}
        config, device = resolve(configs[runs[0]])
        check_divisible(config, dist_env)
        changing = {"resume": resume, "allow_changes": allow_changes}
        check_run_dirs = functools.partial(_check_run_dirs, configs, style_dir, group, **changing)
        check_run_dirs()
        with determinism.algorithms(config.train), explained_memory_errors(config, device, dist_env, styles=len(runs)):
            inputs = _read_inputs(configs, device, group, resume=resume)
            for own in inputs:
                check_style_fits(own.style, device, dist_env)
            if group.is_rank_zero:
                warn_of_shortage(config, device, dist_env, styles=len(runs))
            with _locked(out, runs, style_dir, group, resume=resume):
                changes = check_run_dirs()
                trainer = Trainer(inputs, runs, out, group, stop=stop, profile=profile)
                with explained_storage_errors(out, runs), trainer.explained_divergence():
                    if resume:
                        for style, differences in zip(trainer.styles, changes, strict=True):
                            style.restore(differences, allow_changes=allow_changes)
                    return trainer.train()


def _check_run_dirs(
    configs: Mapping[Path, Config], style_dir: MultiStyleDir | None, group: ProcessGroup, **changing: bool
) -> list[list[str]]:
    """Return what changed in the configuration of each run; only rank 0 sees the directories."""
    return validate_run_dirs(configs, style_dir, **changing) if group.is_rank_zero else [[] for _ in configs]


@contextlib.contextmanager
def _locked(
    out: Path, runs: Sequence[Path], style_dir: MultiStyleDir | None, group: ProcessGroup, *, resume: bool
) -> Iterator[None]:
    """Lock the run directories on rank 0, and first their folder, in which the styles are written down."""
    with contextlib.ExitStack() as locks:
        if group.is_rank_zero:
            if style_dir is not None:
                locks.enter_context(lock_run(out))
                style_dir.validate(resume=resume)
                style_dir.write_styles()
            for run in runs:
                locks.enter_context(lock_run(run))
        yield


def _read_inputs(
    configs: Mapping[Path, Config], device: torch.device, group: ProcessGroup, *, resume: bool
) -> list[Inputs]:
    """Read what the run needs, and check that all ranks have the same; styles share all but their image."""
    failures: list[ReadFailure] = []
    if resume and group.is_rank_zero:
        failures = _earliest(failure for run in configs for failure in read_failures(run / REJECTED_NAME))
    failures = broadcast_failures(failures, group)
    first, *others = configs.values()
    with group.local_rank_zero_first():
        styles = [read_style(config.style) for config in others]  # first, since a mistake in them shows at once
        inputs = read_inputs(first, device, failures)
    all_inputs = [
        inputs,
        *(
            dataclasses.replace(inputs, config=config, style=style, style_sha256=sha256)
            for config, (style, sha256) in zip(others, styles, strict=True)
        ),
    ]
    for own in all_inputs:
        check_equal(group, {"device": device.type, **provenance(own, world_size=group.dist_env.world_size)})
    return all_inputs


def _earliest(failures: Iterable[ReadFailure]) -> list[ReadFailure]:
    """Return each image's first failure: a process may be killed between writing the lists of two styles."""
    found: dict[str, ReadFailure] = {}
    for failure in failures:
        known = found.get(failure.entry.path)
        if known is None or failure.step < known.step:
            found[failure.entry.path] = failure
    return list(found.values())


def _resume_hint(runs: Sequence[Path]) -> str:
    """Say which step all runs have saved, and how to go on after a process was killed."""
    try:
        step = min(max(checkpoint_steps(run), default=0) for run in runs)
    except (OSError, DataError):
        step = 0
    if not step:
        return "no step is saved; then start again"
    return f"step {step} is the last that is saved; go on by the same torchrun command with --resume"
