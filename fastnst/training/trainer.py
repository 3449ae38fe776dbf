"""The training loop: from checked inputs to run directories with style models in them."""

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fastnst.data.loaders import Loader, loader_name, open_loader
from fastnst.data.replacements import ReadFailure, still_failed
from fastnst.data.sampler import Sampler
from fastnst.errors import DivergedError, StoppedBySignal, shell_quote
from fastnst.losses.perceptual import LossTerms
from fastnst.models.style_model import MODEL_NAME
from fastnst.progress import ProgressReport, phase
from fastnst.run_log.writer import RunLog
from fastnst.training.distributed.environment import local_config
from fastnst.training.distributed.process_group import ProcessGroup
from fastnst.training.distributed.synced_batches import SyncedBatches, SyncedFailures, broadcast_failures
from fastnst.training.inputs import Inputs
from fastnst.training.monitoring.profiler import StepProfile, record_span
from fastnst.training.monitoring.throughput import ThroughputMeter
from fastnst.training.run_dir.rejected_images import RejectedImages
from fastnst.training.signals import StopRequest, stopped_by
from fastnst.training.step.graphed_step import WARM_UP, GraphedStep, wants_capture
from fastnst.training.style_run import StyleRun

log = logging.getLogger(__name__)


class Trainer:
    """One process's share of a run: a stream of images, and the styles that are trained on it.

    Args:
        inputs: of each style; they differ in nothing but the style.
        runs: the run directory of each style.
        out: what `--out` names; messages mention it.
        group: the processes that share the run.
        stop: polled after each step.
        profile: steps to trace on rank 0, if any.
    """

    def __init__(
        self,
        inputs: Sequence[Inputs],
        runs: Sequence[Path],
        out: Path,
        group: ProcessGroup,
        *,
        stop: StopRequest,
        profile: int | None = None,
    ) -> None:
        self.out, self.stop, self.group = out, stop, group
        self.profile = profile if group.is_rank_zero else None
        self.inputs = inputs[0]
        self.config, self.device = self.inputs.config, self.inputs.device
        self.num_steps = self.inputs.steps
        self.styles: list[StyleRun] = []
        for own, run in zip(inputs, runs, strict=True):
            name = run.name if len(runs) > 1 else None
            shared_vgg = self.styles[0].net_trainer if self.styles else None
            with phase("prepare networks, style and samples"):
                self.styles.append(StyleRun(own, run, group, name=name, shared_vgg=shared_vgg))
        self.sampler = Sampler(
            self.config.train.seed,
            len(self.inputs.manifest.images),
            self.config.train.batch_size,
            self.num_steps,
            world_size=group.dist_env.world_size,
            fit=self.config.data.fit,
            flip=self.config.data.flip,
        )
        self._rejected: list[RejectedImages] = []

    def train(self) -> list[Path]:
        """Make the remaining steps.

        Returns:
            The style models, in the order of the styles.

        Raises:
            StoppedBySignal: after a save, if a signal came on any rank.
        """
        # Styles that are ahead of the others wait for them.
        done, last = min(style.done for style in self.styles), self.num_steps
        batch_size = self.config.train.batch_size
        models = [style.out / MODEL_NAME for style in self.styles]
        failures = self._prepare_run_dirs(done)
        if done >= last:
            log.info("nothing to do: %d of %d steps are done; set more with --steps", done, last)
            return models
        log.info("%s", self._announcement(done))
        active = [style for style in self.styles if style.done < last]
        with self.stop.deferred():
            with (
                self._run_logs(active),
                self._loader(done, failures) as loader,
                ProgressReport(
                    "train", last, "steps", rate_per_item=batch_size, rate_unit="images", start=done
                ) as progress,
                StepProfile(self.styles[0].out, self.profile, done=done, last=last, device=self.device) as profile,
            ):
                graphed_step = GraphedStep(self.config.train, self.device, processes=self.group.dist_env.world_size)
                batches = self._batches(loader, done, failures)
                meter = ThroughputMeter(batch_size)
                for step in range(done + 1, last + 1):
                    with self._start_phase(step - done, "load images"), meter.waiting(), record_span("data wait"):
                        batch = graphed_step.fetch(batches)
                    styles = [style for style in active if style.done < step]
                    with self._start_phase(step - done, self._work_of_first_steps()):
                        terms = graphed_step(step, batch, [style.net_trainer for style in styles])
                        # Polled once a step, so that all ranks agree: a later signal ends the next step.
                        signum = self.group.all_reduce_max(self.stop.signum or 0)[0]
                        is_final = step == last or bool(signum)
                        note = self._log_metrics(step, styles, terms, meter, is_final=is_final)
                    with meter.paused(), record_span("samples and checkpoints"):
                        self._show_and_save(step, styles, is_final=is_final)
                    progress.advance(note=note)
                    profile.step()
                    if signum and step < last:
                        self.group.exit_unless()
                        raise StoppedBySignal(signum, f"stopped at step {step} of {last}, {self._resume_hint()}")
            for style in active:
                style.log_summary()
        # Too late to end a step early, but the sender still learns that the signal was received.
        if signum := self.group.all_reduce_max(self.stop.signum or 0)[0]:
            self.group.exit_unless()
            raise stopped_by(signum, f"; all {last} steps are done and saved in {self.out}")
        return models

    @staticmethod
    def _start_phase(count: int, label: str) -> contextlib.AbstractContextManager[None]:
        """Return the phase of the first steps of this process, the last of which captures; later ones have none."""
        return phase(f"first steps, {count}: {label}") if count <= WARM_UP + 1 else contextlib.nullcontext()

    def _work_of_first_steps(self) -> str:
        compiled = ["compile by torch.compile"] if self.config.train.compile else []
        if self.device.type == "cuda":
            compiled += ["compile kernels", "choose algorithms"]
            compiled += ["capture the graph"] if wants_capture(self.config.train, self.device) else []
        return ", ".join(compiled) or "compute"

    def _resume_hint(self) -> str:
        is_alone = self.group.dist_env.world_size == 1
        if not is_alone:
            return "which is saved; go on with: the same torchrun command and --resume"
        return f"which is saved; go on with: fastnst train --resume --out {shell_quote(self.out)}"

    def _log_metrics(
        self,
        step: int,
        styles: Sequence[StyleRun],
        terms: Sequence[LossTerms],
        meter: ThroughputMeter,
        *,
        is_final: bool,
    ) -> str | None:
        """Log the losses if they are due; return them for the progress report."""
        if is_final or step == 1 or step % self.config.train.log_every == 0:
            speed = functools.cache(meter.read)  # read once, after the first style's loss
            with record_span("logging"):
                losses = [style.log_metrics(step, own, speed) for style, own in zip(styles, terms, strict=True)]
            return f"loss {' | '.join(losses)}"
        if self.device.type == "cpu":
            # Costs no waiting there, and names a bad step at once.
            for style in styles:
                style.monitor.check_steps(step)
        return None

    def _show_and_save(self, step: int, styles: Sequence[StyleRun], *, is_final: bool) -> None:
        """Log samples and projections, and save checkpoints, where they are due."""
        train, every = self.config.train, self.config.visualize.every
        is_last = step == self.num_steps
        samples = is_last or step % train.sample_every == 0
        projections = every > 0 and (is_last or step % every == 0)
        checkpoint = is_final or step % train.checkpoint_every == 0
        if not (samples or projections or checkpoint):
            return
        with phase("log samples and save"):
            for style in styles:
                style.show_and_save(step, samples=samples, projections=projections, checkpoint=checkpoint)

    def _prepare_run_dirs(self, done: int) -> SyncedFailures:
        """Write each run's configuration and list of rejected images; return what replaces unreadable ones."""
        manifest = self.inputs.manifest
        failures = still_failed(manifest.folder, self.inputs.late, done) if self.group.is_rank_zero else []
        failures = broadcast_failures(failures, self.group)
        if self.group.is_rank_zero:
            self._rejected = [style.prepare(failures, quiet=style is not self.styles[0]) for style in self.styles]
        return SyncedFailures(
            manifest,
            self.group,
            max_percent=self.config.data.max_failed_percent,
            earlier=failures,
            note=self._note_failure,
        )

    def _note_failure(self, failure: ReadFailure) -> None:
        for rejected in self._rejected:
            rejected.add(failure)

    @contextlib.contextmanager
    def _run_logs(self, styles: Sequence[StyleRun]) -> Iterator[None]:
        """Open each style's log on rank 0, and log what does not change in a run that begins."""
        with contextlib.ExitStack() as logs:
            graph = None
            for style in styles:
                if self.group.is_rank_zero:
                    style.run_log = logs.enter_context(RunLog(style.out, start_step=style.done))
                with self.stop.at_once(), phase("log the graph and the first samples"):
                    graph = style.log_start(graph)
            yield

    def _loader(self, done: int, failures: SyncedFailures) -> Loader:
        with phase("start the loader"):
            return open_loader(
                self.inputs.manifest,
                self.sampler,
                local_config(self.config, self.group.dist_env).data,
                device=self.device,
                start_step=done,
                rank=self.group.dist_env.rank,
                replacer=failures.replacements,
            )

    def _batches(self, loader: Loader, done: int, failures: SyncedFailures) -> SyncedBatches:
        # What DALI has decoded ahead, and what was read ahead for it.
        read_ahead = 2 * self.config.data.prefetch + 1
        return SyncedBatches(
            loader, self.sampler, self.group.dist_env.rank, failures, start_step=done, read_ahead=read_ahead
        )

    def _announcement(self, done: int) -> str:
        verb = f"resuming at step {done}" if done else "training"
        loader = loader_name(self.inputs.manifest, self.config.data)
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "the CPU"
        styles = "" if len(self.styles) == 1 else f"{len(self.styles)} styles, "
        return (
            f"{verb}: {styles}{self.num_steps} steps of {self.config.train.batch_size} images, "
            f"{len(self.inputs.manifest.images)} in the folder, {self.config.data.image_size} px, "
            f"{self.config.train.precision} on {device}, loader {loader}; "
            f"run directory {self.out}"
        )

    @contextlib.contextmanager
    def explained_divergence(self) -> Iterator[None]:
        """Add to a divergence error what becomes of the other styles."""
        try:
            yield
        except DivergedError as error:
            if len(self.styles) == 1:
                raise
            raise DivergedError(
                f"{error}. The other styles end with it, at their last checkpoints; go on with each of them by "
                f"fastnst train --resume --out {shell_quote(self.out)}/NAME"
            ) from error
