"""The training loop: from a resolved configuration to run directories with style models in them."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from fastnst.config import Config
from fastnst.data.loaders import Loader, loader_name, open_loader
from fastnst.data.replacements import ReadFailure, read_failures, still_failed
from fastnst.data.sampler import Sampler
from fastnst.errors import DivergedError, StoppedBySignal
from fastnst.models.style_model import MODEL_NAME
from fastnst.progress import ProgressReport
from fastnst.run_log.writer import RunLog
from fastnst.storage import lock_run
from fastnst.training import determinism
from fastnst.training.distributed.environment import DistEnv, check_divisible, local_config
from fastnst.training.distributed.process_group import ProcessGroup, check_equal, choose_device, open_process_group
from fastnst.training.distributed.synced_batches import SyncedBatches, SyncedFailures, broadcast_failures
from fastnst.training.divergence import explained_storage_errors
from fastnst.training.inputs import Inputs, read_inputs, read_style, resolve, with_styles
from fastnst.training.memory.advice import explained_memory_errors
from fastnst.training.monitoring.profiler import StepProfile, check_steps, record_span
from fastnst.training.monitoring.throughput import ThroughputMeter
from fastnst.training.run_dir.layout import REJECTED_NAME
from fastnst.training.run_dir.resume import provenance
from fastnst.training.run_dir.style_folder import MultiStyleDir, run_configs, validate_run_dirs
from fastnst.training.signals import StopRequest, stopped_by
from fastnst.training.step.graphed_step import GraphedStep
from fastnst.training.style_run import StyleRun


def train(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    notify: Callable[[str], None],
    stop: StopRequest | None = None,
    profile: int | None = None,
) -> Path:
    """Train a style; returns the path of the style model.

    Below torchrun each of its processes calls this, and shares the run with the others (see `distributed`).

    Args:
        config: the resolved configuration; `data.folder` and `style.image` are set.
        out: the run directory; new or empty, or with `resume` that of an interrupted run.
        resume: go on from the newest valid checkpoint in `out`.
        allow_changes: with `resume`, go on though configuration, images, style, VGG19 or the number of processes are
            not those of the checkpoint; `notify` is told of each. `config.toml` then holds the new configuration.
        notify: receives one line per event that a user should know of.
        stop: polled after each step; when a signal has come, the run is saved and left.
        profile: how many steps to trace, if any; see `StepProfile`.

    Raises:
        UserError: `out` holds another run, the run to resume was another configuration or other images, or a profile
            has less than one step.
        DataError: images, style or weights cannot be used, or differ from those of the run to resume.
        StorageError: the storage refuses, be it a line of the log: the run ends as if killed, so that none is missing.
        DivergedError: the loss, a gradient or a weight is no longer finite, which no checkpoint shows, or too many
            steps in a row were skipped.
        DeviceError: no such device, or too little memory on it, with what would fit.
        StoppedBySignal: after the save that `stop` asked for.
        SystemExit: another process of the run has raised one of these.
    """
    (model,) = _train({out: config}, out, None, resume, allow_changes, notify, stop, profile)
    return model


def train_styles(
    config: Config,
    styles: Mapping[str, Path],
    out: Path,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    notify: Callable[[str], None],
    stop: StopRequest | None = None,
    profile: int | None = None,
) -> list[Path]:
    """Train several styles in one process, on one stream of images, with one pass of φ over their content.

    Each style has a transform net and a run directory of its own, `out/NAME`, in which everything is as if it had been
    trained alone; `train` can go on with it, too. Where the styles have come to different steps, those that are ahead
    wait for the others.

    Args:
        config: of all styles; `style.image` is replaced.
        styles: name → image; see `styles.style_names`.
        out: the folder that holds the run directories.
        resume: go on from each style's newest valid checkpoint.
        allow_changes: as for `train`.
        notify: as for `train`; what concerns one style begins with its name.
        stop: as for `train`.
        profile: as for `train`; the trace lies in the first style's run directory.

    Returns:
        The style models, in the order of `styles`.

    Raises:
        UserError: as `train`; or `out` holds something else, or other styles.
        SystemExit: and the other errors of `train`.
    """
    folder = MultiStyleDir(out, styles)
    return _train(run_configs(config, styles, out), out, folder, resume, allow_changes, notify, stop, profile)


def _train(
    configs: Mapping[Path, Config],
    out: Path,
    folder: MultiStyleDir | None,
    resume: bool,
    allow_changes: bool,
    notify: Callable[[str], None],
    stop: StopRequest | None,
    profile: int | None,
) -> list[Path]:
    check_steps(profile)
    dist_env, stop = DistEnv.from_environ(), stop or StopRequest()
    runs = list(configs)
    with open_process_group(dist_env, runs, stop) as group:
        notify = notify if group.is_rank_zero else _nobody
        choose_device(configs[runs[0]].train.device, dist_env)
        configs = {run: resolve(config)[0] for run, config in configs.items()}
        config, device = resolve(configs[runs[0]])
        check_divisible(config, dist_env)

        def prepare() -> list[list[str]]:
            """What has changed in each run."""
            if not group.is_rank_zero:
                return [[] for _ in runs]
            return validate_run_dirs(configs, folder, resume=resume, allow_changes=allow_changes)

        prepare()
        with (
            determinism.algorithms(config.train),
            explained_memory_errors(config, device, dist_env, styles=len(runs)),
            contextlib.ExitStack() as locks,
        ):
            late: list[ReadFailure] = []
            if resume and group.is_rank_zero:
                late = _earliest(failure for run in runs for failure in read_failures(run / REJECTED_NAME))
            late = broadcast_failures(late, group)
            with group.local_rank_zero_first():
                others = [(config, *read_style(config)) for config in list(configs.values())[1:]]
                inputs = with_styles(read_inputs(config, device, notify, late), others)
            for one in inputs:
                check_equal(group, {"device": device.type, **provenance(one, world_size=dist_env.world_size)})
            if group.is_rank_zero:
                if folder is not None:
                    locks.enter_context(lock_run(out))
                    folder.validate(resume=resume)
                    folder.write_styles()
                for run in runs:
                    locks.enter_context(lock_run(run))
            changes = prepare()
            shared = _Run(inputs, runs, out, notify, stop, group, profile)
            with explained_storage_errors(out, runs, notify), shared.explained_divergence():
                if resume:
                    for style, differences in zip(shared.styles, changes, strict=True):
                        style.restore(differences, allow=allow_changes)
                return shared.go()


class _Run:
    """One process's share of a run: images, and the styles that learn from them.

    Args:
        inputs: of each style; all but the style is the same.
        runs: their run directories.
        out: what `--out` names.
        notify: told of events, in rank 0 alone.
        stop: polled after each step.
        group: the processes that share the run.
        profile: steps to trace.
    """

    def __init__(
        self,
        inputs: Sequence[Inputs],
        runs: Sequence[Path],
        out: Path,
        notify: Callable[[str], None],
        stop: StopRequest,
        group: ProcessGroup,
        profile: int | None,
    ) -> None:
        self.out, self.notify, self.stop, self.group = out, notify, stop, group
        self.profile = profile if group.is_rank_zero else None
        self.inputs = inputs[0]
        config = self.config = self.inputs.config
        self.device = self.inputs.device
        self.styles: list[StyleRun] = []
        for own, run in zip(inputs, runs, strict=True):
            tell = notify if len(runs) == 1 else functools.partial(_tell_of, run.name, notify)
            beside = self.styles[0] if self.styles else None
            self.styles.append(StyleRun(own, run, tell, group, beside=beside, share=1 / len(runs)))
        self.order = Sampler(
            config.train.seed,
            len(self.inputs.manifest.images),
            config.train.batch_size,
            self.inputs.steps,
            world_size=group.dist_env.world_size,
            fit=config.data.fit,
            flip=config.data.flip,
        )

    def go(self) -> list[Path]:
        """Make the steps that are left; returns the style models."""
        # Those of a style that is ahead of the others are made without it.
        done = min(style.done for style in self.styles)
        late = still_failed(self.inputs.manifest.folder, self.inputs.late, done) if self.group.is_rank_zero else []
        late = broadcast_failures(late, self.group)
        note: Callable[[ReadFailure], None] = _nobody
        if self.group.is_rank_zero:
            lists = [style.prepare(late, self.notify if style is self.styles[0] else _nobody) for style in self.styles]

            def note(failure: ReadFailure) -> None:
                for each in lists:
                    each.add(failure)

        self.failures = SyncedFailures(
            self.inputs.manifest,
            self.group,
            max_percent=self.config.data.max_failed_percent,
            earlier=late,
            note=note,
        )
        models = [style.out / MODEL_NAME for style in self.styles]
        if done >= self.inputs.steps:
            self.notify(f"nothing to do: {done} of {self.inputs.steps} steps are done; set more with --steps")
            return models
        self.notify(self._announcement(done))
        first = self.styles[0]
        if self.config.train.deterministic and not done and self.group.is_rank_zero:
            own = local_config(self.config, self.group.dist_env)
            self.notify(determinism.cost(first.net, first.loss, own, self.device))
        with self.stop.deferred():
            with contextlib.ExitStack() as logs:
                graph = None
                active = [style for style in self.styles if style.done < self.inputs.steps]
                for style in active:
                    if self.group.is_rank_zero:
                        style.log = logs.enter_context(RunLog(style.out, start_step=style.done))
                    with self.stop.at_once():
                        graph = style.begin(graph)
                self._steps(done)
            for style in active:
                style.report()
        # Too late to end a step early; whoever sent it still learns that it was heard.
        if signum := self.group.all_reduce_max(self.stop.signum or 0)[0]:
            self.group.exit_unless()
            raise stopped_by(signum, f"; all {self.inputs.steps} steps are done and saved in {self.out}")
        return models

    def _steps(self, done: int) -> None:
        config, last = self.config.train, self.inputs.steps
        meter = ThroughputMeter(config.batch_size, self.device)
        steps = GraphedStep(config, self.device, processes=self.group.dist_env.world_size, notify=self.notify)
        with (
            self._loader(done) as loader,
            ProgressReport(
                "train", last, "steps", rate_per_item=config.batch_size, rate_unit="images", start=done
            ) as progress,
            StepProfile(
                self.styles[0].out, self.profile, done=done, last=last, device=self.device, notify=self.notify
            ) as profile,
        ):
            batches = self._batches(loader, done)
            for step in range(done + 1, last + 1):
                with meter.waiting(), record_span("data wait"):
                    batch = steps.fetch(batches)
                styles = [style for style in self.styles if style.done < step]
                terms = steps(step, batch, [style.step for style in styles])
                note = None
                due = [style.projections_due(step) for style in styles]
                # Asked once a step: a signal that comes later than this finds the next step, which it then ends.
                signum, *projects = self.group.all_reduce_max(self.stop.signum or 0, *due)
                ends = step == last or signum
                if ends or step == 1 or step % config.log_every == 0:
                    speed = functools.cache(functools.partial(meter.read, step - done))
                    with record_span("logging"):
                        losses = [style.log_metrics(step, own, speed) for style, own in zip(styles, terms, strict=True)]
                    note = f"loss {' | '.join(losses)}"
                elif self.device.type == "cpu":
                    for style in styles:
                        style.guard.check_health(step)
                looks = step == last or step % config.sample_every == 0
                saves = bool(ends or step % config.checkpoint_every == 0)
                with meter.paused(), record_span("look and save"):
                    for style, own in zip(styles, projects, strict=True):
                        style.look_and_save(step, looks=looks, projects=bool(own), saves=saves)
                progress.advance(note=note)
                profile.step()
                if signum and step < last:
                    self.group.exit_unless()
                    raise StoppedBySignal(
                        signum,
                        f"stopped at step {step} of {last}, which is saved; "
                        f"go on with: fastnst train --resume --out {self.out}",
                    )

    def _loader(self, done: int) -> Loader:
        return open_loader(
            self.inputs.manifest,
            self.order,
            local_config(self.config, self.group.dist_env).data,
            device=self.device,
            start_step=done,
            rank=self.group.dist_env.rank,
            replacements=self.failures.replacements,
        )

    def _batches(self, loader: Loader, done: int) -> SyncedBatches:
        # What DALI has decoded ahead, and what was read ahead for it.
        read_ahead = 2 * self.config.data.prefetch + 1
        return SyncedBatches(
            loader, self.order, self.group.dist_env.rank, self.failures, start_step=done, read_ahead=read_ahead
        )

    def _announcement(self, done: int) -> str:
        verb = f"resuming at step {done}" if done else "training"
        loader = loader_name(self.inputs.manifest, self.config.data)
        styles = "" if len(self.styles) == 1 else f"{len(self.styles)} styles, "
        return (
            f"{verb}: {styles}{self.inputs.steps} steps of {self.config.train.batch_size} images, "
            f"{len(self.inputs.manifest.images)} in the folder, {self.config.data.image_size} px, "
            f"{self.config.train.precision} on {_device_name(self.device)}, loader {loader}; "
            f"run directory {self.out}"
        )

    @contextlib.contextmanager
    def explained_divergence(self) -> Iterator[None]:
        """Say what becomes of the other styles when one goes wrong."""
        try:
            yield
        except DivergedError as error:
            if len(self.styles) == 1:
                raise
            raise DivergedError(
                f"{error}. The other styles end with it, at their last checkpoints; go on with each of them by "
                f"fastnst train --resume --out {self.out}/NAME"
            ) from error


def _earliest(failures: Iterable[ReadFailure]) -> list[ReadFailure]:
    """Each image once, as it failed first: a process may be killed between the lists of two styles."""
    found: dict[str, ReadFailure] = {}
    for failure in failures:
        known = found.get(failure.entry.path)
        if known is None or failure.step < known.step:
            found[failure.entry.path] = failure
    return list(found.values())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _tell_of(name: str, notify: Callable[[str], None], text: str) -> None:
    notify(f"{name}: {text}")


def _nobody(_: object) -> None:
    """Told where another process tells."""
