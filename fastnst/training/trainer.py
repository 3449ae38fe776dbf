"""The training loop: from a resolved configuration to run directories with style models in them."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from fastnst.config import Config
from fastnst.data.loaders import Loader, loader_name, open_loader
from fastnst.data.replacements import LateFailure, read_late_failures, still_failed
from fastnst.data.sampler import RunOrder
from fastnst.errors import DivergedError, StoppedBySignal
from fastnst.models.style_model import MODEL_NAME
from fastnst.progress import ProgressReport
from fastnst.run_log.writer import RunLog
from fastnst.storage import lock_run
from fastnst.training import determinism
from fastnst.training.distributed.environment import check_shareable, launched, of_one_process
from fastnst.training.distributed.process_group import Team, check_equal, choose_device, open_team
from fastnst.training.distributed.synced_batches import SharedBatches, SharedFailures, of_leader
from fastnst.training.divergence import explained_storage_errors
from fastnst.training.inputs import Inputs, read_inputs, read_style, resolve, with_styles
from fastnst.training.memory.available import explained_memory_errors
from fastnst.training.monitoring.profiler import StepProfile, check_steps, phase
from fastnst.training.monitoring.throughput import Meter
from fastnst.training.run_dir.layout import REJECTED_NAME
from fastnst.training.run_dir.resume import origin_of
from fastnst.training.run_dir.style_folder import StyleFolder, prepare_runs, run_configs
from fastnst.training.signals import StopRequest, stopped_by
from fastnst.training.step.graphed_step import Steps
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
        config: the resolved configuration; `data.folder` and `style.picture` are set.
        out: the run directory; new or empty, or with `resume` that of an interrupted run.
        resume: go on from the newest valid checkpoint in `out`.
        allow_changes: with `resume`, go on though configuration, pictures, style, VGG19 or the number of processes are
            not those of the checkpoint; `notify` is told of each. `config.toml` then holds the new configuration.
        notify: receives one line per event that a user should know of.
        stop: polled after each step; when a signal has come, the run is saved and left.
        profile: how many steps to trace, if any; see `StepProfile`.

    Raises:
        UserError: `out` holds another run, the run to resume was another configuration or other pictures, or a profile
            has less than one step.
        DataError: pictures, style or weights cannot be used, or differ from those of the run to resume.
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
    """Train several styles in one process, on one stream of pictures, with one pass of φ over their content.

    Each style has a transform net and a run directory of its own, `out/NAME`, in which everything is as if it had been
    trained alone; `train` can go on with it, too. Where the styles have come to different steps, those that are ahead
    wait for the others.

    Args:
        config: of all styles; `style.picture` is replaced.
        styles: name → picture; see `styles.named_styles`.
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
    folder = StyleFolder(out, styles)
    return _train(run_configs(config, styles, out), out, folder, resume, allow_changes, notify, stop, profile)


def _train(
    configs: Mapping[Path, Config],
    out: Path,
    folder: StyleFolder | None,
    resume: bool,
    allow_changes: bool,
    notify: Callable[[str], None],
    stop: StopRequest | None,
    profile: int | None,
) -> list[Path]:
    check_steps(profile)
    launch, stop = launched(), stop or StopRequest()
    runs = list(configs)
    with open_team(launch, runs, stop) as team:
        notify = notify if team.leads else _nobody
        choose_device(configs[runs[0]].train.device, launch)
        configs = {run: resolve(config)[0] for run, config in configs.items()}
        config, device = resolve(configs[runs[0]])
        check_shareable(config, launch)

        def prepare() -> list[list[str]]:
            """What has changed in each run."""
            if not team.leads:
                return [[] for _ in runs]
            return prepare_runs(configs, folder, resume=resume, allow_changes=allow_changes)

        prepare()
        with (
            determinism.algorithms(config.train),
            explained_memory_errors(config, device, launch, styles=len(runs)),
            contextlib.ExitStack() as locks,
        ):
            late: list[LateFailure] = []
            if resume and team.leads:
                late = _earliest(failure for run in runs for failure in read_late_failures(run / REJECTED_NAME))
            late = of_leader(late, team)
            with team.first_on_each_machine():
                others = [(config, *read_style(config)) for config in list(configs.values())[1:]]
                inputs = with_styles(read_inputs(config, device, notify, late), others)
            for one in inputs:
                check_equal(team, {"device": device.type, **origin_of(one, world_size=launch.world_size)})
            if team.leads:
                if folder is not None:
                    locks.enter_context(lock_run(out))
                    folder.check(resume=resume)
                    folder.write()
                for run in runs:
                    locks.enter_context(lock_run(run))
            changes = prepare()
            shared = _Run(inputs, runs, out, notify, stop, team, profile)
            with explained_storage_errors(out, runs, notify), shared.explained_divergence():
                if resume:
                    for style, differences in zip(shared.styles, changes, strict=True):
                        style.restore(differences, allow=allow_changes)
                return shared.go()


class _Run:
    """One process's share of a run: pictures, and the styles that learn from them.

    Args:
        inputs: of each style; all but the style is the same.
        runs: their run directories.
        out: what `--out` names.
        notify: told of events, in rank 0 alone.
        stop: polled after each step.
        team: the processes that share the run.
        profile: steps to trace.
    """

    def __init__(
        self,
        inputs: Sequence[Inputs],
        runs: Sequence[Path],
        out: Path,
        notify: Callable[[str], None],
        stop: StopRequest,
        team: Team,
        profile: int | None,
    ) -> None:
        self.out, self.notify, self.stop, self.team = out, notify, stop, team
        self.profile = profile if team.leads else None
        self.inputs = inputs[0]
        config = self.config = self.inputs.config
        self.device = self.inputs.device
        self.styles: list[StyleRun] = []
        for own, run in zip(inputs, runs, strict=True):
            tell = notify if len(runs) == 1 else functools.partial(_tell_of, run.name, notify)
            beside = self.styles[0] if self.styles else None
            self.styles.append(StyleRun(own, run, tell, team, beside=beside, share=1 / len(runs)))
        self.order = RunOrder(
            config.train.seed,
            len(self.inputs.manifest.images),
            config.train.batch_size,
            self.inputs.steps,
            world_size=team.launch.world_size,
            fit=config.data.fit,
            flip=config.data.flip,
        )

    def go(self) -> list[Path]:
        """Make the steps that are left; returns the style models."""
        # Those of a style that is ahead of the others are made without it.
        done = min(style.done for style in self.styles)
        late = still_failed(self.inputs.manifest.folder, self.inputs.late, done) if self.team.leads else []
        late = of_leader(late, self.team)
        note: Callable[[LateFailure], None] = _nobody
        if self.team.leads:
            lists = [style.prepare(late, self.notify if style is self.styles[0] else _nobody) for style in self.styles]

            def note(failure: LateFailure) -> None:
                for each in lists:
                    each.add(failure)

        self.failures = SharedFailures(
            self.inputs.manifest,
            self.team,
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
        if self.config.train.deterministic and not done and self.team.leads:
            own = of_one_process(self.config, self.team.launch)
            self.notify(determinism.cost(first.net, first.loss, own, self.device))
        with self.stop.deferred():
            with contextlib.ExitStack() as logs:
                graph = None
                active = [style for style in self.styles if style.done < self.inputs.steps]
                for style in active:
                    if self.team.leads:
                        style.log = logs.enter_context(RunLog(style.out, start_step=style.done))
                    with self.stop.at_once():
                        graph = style.begin(graph)
                self._steps(done)
            for style in active:
                style.report()
        # Too late to end a step early; whoever sent it still learns that it was heard.
        if signum := self.team.agree(self.stop.signum or 0)[0]:
            self.team.leave_to()
            raise stopped_by(signum, f"; all {self.inputs.steps} steps are done and saved in {self.out}")
        return models

    def _steps(self, done: int) -> None:
        config, last = self.config.train, self.inputs.steps
        meter = Meter(config.batch_size, self.device)
        steps = Steps(config, self.device, processes=self.team.launch.world_size, notify=self.notify)
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
                with meter.waiting(), phase("data wait"):
                    batch = steps.fetch(batches)
                styles = [style for style in self.styles if style.done < step]
                terms = steps(step, batch, [style.step for style in styles])
                note = None
                due = [style.projections_due(step) for style in styles]
                # Asked once a step: a signal that comes later than this finds the next step, which it then ends.
                signum, *projects = self.team.agree(self.stop.signum or 0, *due)
                ends = step == last or signum
                if ends or step == 1 or step % config.log_every == 0:
                    speed = functools.cache(functools.partial(meter.read, step - done))
                    with phase("logging"):
                        losses = [style.log_metrics(step, own, speed) for style, own in zip(styles, terms, strict=True)]
                    note = f"loss {' | '.join(losses)}"
                elif self.device.type == "cpu":
                    for style in styles:
                        style.guard.check_health(step)
                looks = step == last or step % config.sample_every == 0
                saves = bool(ends or step % config.checkpoint_every == 0)
                with meter.paused(), phase("look and save"):
                    for style, own in zip(styles, projects, strict=True):
                        style.look_and_save(step, looks=looks, projects=bool(own), saves=saves)
                progress.advance(note=note)
                profile.step()
                if signum and step < last:
                    self.team.leave_to()
                    raise StoppedBySignal(
                        signum,
                        f"stopped at step {step} of {last}, which is saved; "
                        f"go on with: fastnst train --resume --out {self.out}",
                    )

    def _loader(self, done: int) -> Loader:
        return open_loader(
            self.inputs.manifest,
            self.order,
            of_one_process(self.config, self.team.launch).data,
            device=self.device,
            start_step=done,
            rank=self.team.launch.rank,
            replacements=self.failures.replacements,
        )

    def _batches(self, loader: Loader, done: int) -> SharedBatches:
        # What DALI has decoded ahead, and what was read ahead for it.
        read_ahead = 2 * self.config.data.prefetch + 1
        return SharedBatches(
            loader, self.order, self.team.launch.rank, self.failures, start_step=done, read_ahead=read_ahead
        )

    def _announcement(self, done: int) -> str:
        verb = f"resuming at step {done}" if done else "training"
        loader = loader_name(self.inputs.manifest, self.config.data)
        styles = "" if len(self.styles) == 1 else f"{len(self.styles)} styles, "
        return (
            f"{verb}: {styles}{self.inputs.steps} steps of {self.config.train.batch_size} pictures, "
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


def _earliest(failures: Iterable[LateFailure]) -> list[LateFailure]:
    """Each picture once, as it failed first: a process may be killed between the lists of two styles."""
    found: dict[str, LateFailure] = {}
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
