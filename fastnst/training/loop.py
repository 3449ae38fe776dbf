"""The training loop: from a resolved configuration to a run directory with a style model in it."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from fastnst import __version__
from fastnst.config import Config, to_toml
from fastnst.data import Loader, loader_name, open_loader
from fastnst.data.order import RunOrder
from fastnst.data.replacements import LateFailure, read_late_failures, still_failed
from fastnst.device import ran_out_of_memory
from fastnst.errors import DataError, StoppedBySignal
from fastnst.losses import PerceptualLoss
from fastnst.models.style_model import MODEL_NAME, save_style_model
from fastnst.models.transform_net import TransformNet
from fastnst.progress import ProgressReport
from fastnst.storage import lock_run, remove_leftovers, write_atomic
from fastnst.summaries import METRICS_NAME, RunLog, loss_scalars
from fastnst.training import determinism
from fastnst.training.checkpoint import Checkpoint, remove_old_checkpoints, save_checkpoint
from fastnst.training.distributed import Team, check_equal, choose_device, open_team
from fastnst.training.guard import Guard, explained_storage_errors
from fastnst.training.inputs import Inputs, read_inputs, resolve
from fastnst.training.launch import check_shareable, launched, of_one_process
from fastnst.training.looks import Looks
from fastnst.training.memory import explained_memory_errors
from fastnst.training.meter import Meter
from fastnst.training.profile import StepProfile, check_steps, phase
from fastnst.training.rejected import RejectedPictures
from fastnst.training.restore import steps_of_run
from fastnst.training.resume import (
    changes_since,
    check_fits,
    checkpoint_to_resume,
    origin_of,
    shared_checkpoint,
    tell_changes,
)
from fastnst.training.run_directory import CONFIG_NAME, REJECTED_NAME, prepare_run
from fastnst.training.shared_batches import SharedBatches, SharedFailures, of_leader
from fastnst.training.signals import StopRequest, stopped_by
from fastnst.training.step import TrainingStep


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
    check_steps(profile)
    launch, stop = launched(), stop or StopRequest()
    with open_team(launch, out, stop) as team:
        notify = notify if team.leads else _nobody
        choose_device(config.train.device, launch)
        config, device = resolve(config)
        check_shareable(config, launch)
        if team.leads:
            prepare_run(out, config, resume=resume, allow_changes=allow_changes)
        with determinism.algorithms(config.train), explained_memory_errors(config, device, launch):
            late = read_late_failures(out / REJECTED_NAME) if resume and team.leads else []
            late = of_leader(late, team)
            with team.first_on_each_machine():
                inputs = read_inputs(config, device, notify, late)
            check_equal(team, {"device": device.type, **origin_of(inputs, world_size=launch.world_size)})
            with lock_run(out) if team.leads else contextlib.nullcontext():
                changes = prepare_run(out, config, resume=resume, allow_changes=allow_changes) if team.leads else []
                run = _Run(inputs, out, notify, stop, team, profile)
                with explained_storage_errors(out, notify):
                    return run.go(run.restore(changes, allow=allow_changes) if resume else 0)


class _Run:
    """One process's share of a run."""

    def __init__(
        self,
        inputs: Inputs,
        out: Path,
        notify: Callable[[str], None],
        stop: StopRequest,
        team: Team,
        profile: int | None,
    ) -> None:
        self.inputs, self.out, self.notify, self.stop, self.team = inputs, out, notify, stop, team
        self.profile = profile if team.leads else None
        config, device = inputs.config, inputs.device
        self.config, self.device = config, device
        torch.manual_seed(config.train.seed)
        self.net = TransformNet(config.model.architecture, config.model.norm)
        self.net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.net.train()
        loss = PerceptualLoss(inputs.vgg, config.loss).to(device=device)
        loss.set_style(inputs.style.to(device))
        self.loss = loss
        parallel = team.parallel(self.net, device, config.data.image_size)
        self.step = TrainingStep(self.net, loss, config.train, device, parallel=parallel)
        self.guard = Guard(self.step, config.train, team, out, notify)
        self.order = RunOrder(
            config.train.seed,
            len(inputs.manifest.images),
            config.train.batch_size,
            inputs.steps,
            world_size=team.launch.world_size,
            fit=config.data.fit,
            flip=config.data.flip,
        )
        self.looks = Looks(inputs, self.net, loss) if team.leads else None

    def restore(self, changes: list[str], *, allow: bool) -> int:
        """Take over the newest valid checkpoint, if there is one; returns the steps done.

        `changes` are what is known to differ from the run's saved configuration.
        """
        if not self.team.leads:
            return self._take_over(None)
        checkpoint = checkpoint_to_resume(self.out, self.notify)
        if checkpoint is None:
            tell_changes(changes, 0, self.notify)
            self.notify(f"{self.out} holds no checkpoint yet; starting at step 0")
            return self._take_over(None)
        origin = origin_of(self.inputs, world_size=self.order.world_size)
        changes = changes_since(checkpoint, origin, allow=allow)
        check_fits(checkpoint, self.net)
        self._take_over(checkpoint)
        tell_changes(changes, checkpoint.step, self.notify)
        # The style model is written behind its checkpoint, and a process may have been killed in between. What was
        # allowed to change is recorded, so that it need not be allowed again.
        if changes:
            self._save_checkpoint(checkpoint.step)
        if changes or steps_of_run(self.out) != checkpoint.step:
            self._save_model(checkpoint.step)
        remove_old_checkpoints(self.out, checkpoint.step, keep=self.config.train.keep_checkpoints)
        return checkpoint.step

    def go(self, done: int) -> Path:
        """Make the steps that follow `done`."""
        note: Callable[[LateFailure], None] = _nobody
        late = still_failed(self.inputs.manifest.folder, self.inputs.late, done) if self.team.leads else []
        late = of_leader(late, self.team)
        if self.team.leads:
            for name in (CONFIG_NAME, REJECTED_NAME, METRICS_NAME):
                remove_leftovers(self.out / name)
            write_atomic(self.out / CONFIG_NAME, to_toml(self.config).encode())
            note = RejectedPictures(self.out, self.inputs.manifest, late, self.notify).add
        self.failures = SharedFailures(
            self.inputs.manifest,
            self.team,
            max_percent=self.config.data.max_failed_percent,
            earlier=late,
            note=note,
        )
        if done >= self.inputs.steps:
            self.notify(f"nothing to do: {done} of {self.inputs.steps} steps are done; set more with --steps")
            return self.out / MODEL_NAME
        self.notify(self._announcement(done))
        if self.config.train.deterministic and not done and self.team.leads:
            own = of_one_process(self.config, self.team.launch)
            self.notify(determinism.cost(self.net, self.loss, own, self.device))
        with self.stop.deferred():
            with RunLog(self.out, start_step=done) if self.team.leads else contextlib.nullcontext() as log:
                if not done and log is not None and self.looks is not None:
                    with self.stop.at_once():
                        self.looks.begin(log)
                self._steps(log, done)
            if self.looks is not None:
                self.looks.report(self.notify)
            if self.step.scaler.is_enabled():
                skipped, scale = self.step.skipped.read()[0], self.step.scaler.get_scale()
                self.notify(
                    f"fp16: {skipped} of {self.inputs.steps} steps skipped, since a gradient overflowed; "
                    f"the loss scale is now {scale:g}"
                )
        # Too late to end a step early; whoever sent it still learns that it was heard.
        if signum := self.team.agree(self.stop.signum or 0)[0]:
            self.team.leave_to()
            raise stopped_by(signum, f"; all {self.inputs.steps} steps are done and saved in {self.out}")
        return self.out / MODEL_NAME

    def _steps(self, log: RunLog | None, done: int) -> None:
        config, last = self.config.train, self.inputs.steps
        meter = Meter(config.batch_size, self.device)
        with (
            self._loader(done) as loader,
            ProgressReport(
                "train", last, "steps", rate_per_item=config.batch_size, rate_unit="images", start=done
            ) as progress,
            StepProfile(
                self.out, self.profile, done=done, last=last, device=self.device, notify=self.notify
            ) as profile,
        ):
            batches = self._batches(loader, done)
            for step in range(done + 1, last + 1):
                with meter.waiting(), phase("data wait"):
                    batch = next(batches)
                terms = self.step(step, batch)
                note = None
                is_due = self.looks is not None and self.looks.projections_due(step, last)
                # Asked once a step: a signal that comes later than this finds the next step, which it then ends.
                signum, projects = self.team.agree(self.stop.signum or 0, is_due)
                ends = step == last or signum
                if ends or step == 1 or step % config.log_every == 0:
                    with phase("logging"):
                        scalars = self.team.mean(loss_scalars(terms))
                        self.guard.check_health(step)
                        if log is not None and self.looks is not None:
                            speed = meter.read(step - done) | self.looks.cost()
                            log.metrics(step, scalars | self._training_scalars() | speed)
                    note = f"loss {scalars['loss/total']:.4g}{self._skipped_note()}"
                elif self.device.type == "cpu":
                    self.guard.check_health(step)
                looks = step == last or step % config.sample_every == 0
                saves = ends or step % config.checkpoint_every == 0
                with meter.paused(), phase("look and save"):
                    if looks or projects or saves:
                        self.guard.check_weights(step)
                    if log is not None and self.looks is not None:
                        if looks:
                            self.looks.look(log, step)
                        if projects:
                            self.looks.project(log, step)
                        if saves:
                            self._save(log, step)
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

    def _save(self, log: RunLog, step: int) -> None:
        # In this order: what a checkpoint knows of has been logged, and a style model has a checkpoint to go on from.
        log.flush()
        self._save_checkpoint(step)
        self._save_model(step)

    def _save_checkpoint(self, step: int) -> None:
        tensors = self.step.state_tensors()
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        state = {"scaler": self.step.state_values(), **origin_of(self.inputs, world_size=self.order.world_size)}
        save_checkpoint(self.out, step, tensors=tensors, state=state, keep=self.config.train.keep_checkpoints)

    def _save_model(self, step: int) -> None:
        assert self.config.style.picture is not None
        metadata = {
            "preset": self.config.preset,
            "style": self.config.style.picture.name,
            "style_sha256": self.inputs.style_sha256,
            "steps": str(step),
            "image_size": str(self.config.data.image_size),
            "fastnst_version": __version__,
        }
        remove_leftovers(self.out / MODEL_NAME)
        save_style_model(self.out / MODEL_NAME, self.net, metadata=metadata)

    def _take_over(self, checkpoint: Checkpoint | None) -> int:
        """Go on with rank 0's `checkpoint`, in all processes; returns its step, 0 if there is none."""
        checkpoint = shared_checkpoint(checkpoint, self.team)
        if checkpoint is None:
            return 0
        try:
            self.step.load_state(checkpoint.tensors, checkpoint.state["scaler"])
            torch.set_rng_state(checkpoint.tensors["rng.cpu"])
            if self.device.type == "cuda" and "rng.cuda" in checkpoint.tensors:
                torch.cuda.set_rng_state(checkpoint.tensors["rng.cuda"], self.device)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            # The bytes are as they were written, by something else than this.
            if ran_out_of_memory(error):
                raise
            raise DataError(
                f"{checkpoint.path} holds no state that training can go on from ({str(error)[:200]}); remove it to go "
                "on from an older one, or start a new run in another --out"
            ) from error
        return checkpoint.step

    def _training_scalars(self) -> dict[str, float]:
        scalars = {"train/learning_rate": self.config.train.learning_rate}
        if self.step.scaler.is_enabled():
            scalars["train/loss_scale"] = float(self.step.scaler.get_scale())
            scalars["train/skipped_steps"] = self.step.skipped.read()[0]
        if self.device.type == "cuda":
            scalars["memory/peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return scalars

    def _skipped_note(self) -> str:
        skipped = self.step.skipped.read()[0] if self.step.scaler.is_enabled() else 0
        return f", {skipped} skipped" if skipped else ""

    def _announcement(self, done: int) -> str:
        verb = f"resuming at step {done}" if done else "training"
        loader = loader_name(self.inputs.manifest, self.config.data)
        return (
            f"{verb}: {self.inputs.steps} steps of {self.config.train.batch_size} pictures, "
            f"{len(self.inputs.manifest.images)} in the folder, {self.config.data.image_size} px, "
            f"{self.config.train.precision} on {_device_name(self.device)}, loader {loader}; "
            f"run directory {self.out}"
        )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _nobody(_: object) -> None:
    """Told where another process tells."""
