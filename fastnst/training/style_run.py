"""One style of a run: its transform net and loss, and its run directory."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch

from fastnst import __version__
from fastnst.config import to_toml
from fastnst.data.replacements import ReadFailure
from fastnst.device import ran_out_of_memory
from fastnst.errors import DataError
from fastnst.losses.perceptual import LossTerms, PerceptualLoss
from fastnst.models.style_model import MODEL_NAME, save_style_model
from fastnst.models.transform_net import TransformNet
from fastnst.run_log.writer import METRICS_NAME, RunLog, loss_scalars
from fastnst.storage import remove_leftovers, write_atomic
from fastnst.training.distributed.process_group import ProcessGroup
from fastnst.training.divergence import DivergenceMonitor
from fastnst.training.inputs import Inputs
from fastnst.training.monitoring.snapshots import SampleLogger
from fastnst.training.run_dir.checkpoint import Checkpoint, remove_old_checkpoints, save_checkpoint
from fastnst.training.run_dir.layout import CONFIG_NAME, REJECTED_NAME
from fastnst.training.run_dir.load_net import steps_of_run
from fastnst.training.run_dir.rejected_images import RejectedImages
from fastnst.training.run_dir.resume import check_fits, checkpoint_to_resume, diff_provenance, provenance
from fastnst.training.step.train_step import TrainingStep

if TYPE_CHECKING:
    from tensorboard.compat.proto.graph_pb2 import GraphDef


_ORDER_CHANGES = ("train.seed was", "train.batch_size was", "the images in")


class StyleRun:
    """What belongs to one style, in one process of the run; only rank 0's writes.

    Args:
        inputs: configuration, style image, training images and VGG19.
        out: the run directory, locked by this process if it leads.
        notify: receives one line per event that a user should know of.
        group: the processes that share the run.
        beside: another style of the run; both have all in common but the style image.
        share: of `visualize.max_percent`, what this style's projections may take.
    """

    def __init__(
        self,
        inputs: Inputs,
        out: Path,
        notify: Callable[[str], None],
        group: ProcessGroup,
        *,
        beside: "StyleRun | None" = None,
        share: float = 1.0,
    ) -> None:
        self.inputs, self.out, self.notify, self.group = inputs, out, notify, group
        config, device = inputs.config, inputs.device
        self.config, self.device = config, device
        # Before each: a style's weights begin as they would in a run of its own.
        torch.manual_seed(config.train.seed)
        self.net = TransformNet(config.model.architecture, config.model.norm)
        self.net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.net.train()
        loss = PerceptualLoss(inputs.vgg, config.loss).to(device=device)
        loss.set_style(inputs.style.to(device))
        self.loss = loss
        parallel = group.data_parallel(self.net, device, config.data.image_size)
        other = beside.step if beside is not None else None
        self.step: TrainingStep = TrainingStep(self.net, loss, config.train, device, parallel=parallel, beside=other)
        self.guard = DivergenceMonitor(self.step, config.train, group, out, notify)
        self.looks = SampleLogger(inputs, self.net, loss, share=share) if group.is_rank_zero else None
        self.log: RunLog | None = None
        self.done = 0
        """Steps that are done already."""

    def restore(self, changes: list[str], *, allow: bool) -> None:
        """Take over the newest valid checkpoint, if there is one.

        Args:
            changes: what is known to differ from the run's saved configuration.
            allow: go on though something differs from what the checkpoint was trained with.
        """
        if not self.group.is_rank_zero:
            self._take_over(None)
            return
        checkpoint = checkpoint_to_resume(self.out)
        if checkpoint is None:
            self._log_changes(changes, 0)
            self.notify(f"{self.out} holds no checkpoint yet; starting at step 0")
            self._take_over(None)
            return
        origin = provenance(self.inputs, world_size=self.group.dist_env.world_size)
        changes = diff_provenance(checkpoint, origin, allow=allow)
        check_fits(checkpoint, self.net)
        self._take_over(checkpoint)
        self._log_changes(changes, checkpoint.step)
        # The style model is written behind its checkpoint, and a process may have been killed in between. What was
        # allowed to change is recorded, so that it need not be allowed again.
        if changes:
            self._save_checkpoint(checkpoint.step)
        if changes or steps_of_run(self.out) != checkpoint.step:
            self._save_model(checkpoint.step)
        remove_old_checkpoints(self.out, checkpoint.step, keep=self.config.train.keep_checkpoints)

    def prepare(self, late: Sequence[ReadFailure], notify: Callable[[str], None]) -> RejectedImages:
        """Write down the configuration and which images are not used; returns what takes down further ones."""
        for name in (CONFIG_NAME, REJECTED_NAME, METRICS_NAME):
            remove_leftovers(self.out / name)
        write_atomic(self.out / CONFIG_NAME, to_toml(self.config).encode())
        return RejectedImages(self.out, self.inputs.manifest, late, quiet=getattr(notify, "__name__", "") == "_nobody")

    def begin(self, graph: "GraphDef | None") -> "GraphDef | None":
        """Log what does not change, of a run that begins; `graph` is another style's, which is the same."""
        if self.looks is None or self.log is None or self.done:
            return graph
        return self.looks.begin(self.log, graph)

    def report(self) -> None:
        """At the end, say what was spent on projections, and what was skipped."""
        if self.looks is not None:
            self.looks.report(self.notify)
        if self.step.scaler.is_enabled():
            skipped, scale = self.step.skipped.read()[0], self.step.scaler.get_scale()
            self.notify(
                f"fp16: {skipped} of {self.inputs.steps} steps skipped, since a gradient overflowed; "
                f"the loss scale is now {scale:g}"
            )

    def projections_due(self, step: int) -> bool:
        """Whether this process wants to project after `step`."""
        return self.looks is not None and self.looks.projections_due(step, self.inputs.steps)

    def log_metrics(self, step: int, terms: LossTerms, speed: Callable[[], Mapping[str, float]]) -> str:
        """Log a step of which each process has its `terms`; returns the loss for the progress bar."""
        scalars = self.group.all_reduce_mean(loss_scalars(terms))
        self.guard.check_health(step)
        if self.log is not None and self.looks is not None:
            self.log.metrics(step, scalars | self._training_scalars() | dict(speed()) | self.looks.cost())
        return f"{scalars['loss/total']:.4g}{self._skipped_note()}"

    def look_and_save(self, step: int, *, looks: bool, projects: bool, saves: bool) -> None:
        """What is due after `step`."""
        if looks or projects or saves:
            self.guard.check_weights(step)
        if self.log is not None and self.looks is not None:
            if looks:
                self.looks.look(self.log, step)
            if projects:
                self.looks.project(self.log, step)
            if saves:
                self._save(self.log, step)

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
        origin = provenance(self.inputs, world_size=self.group.dist_env.world_size)
        state = {"scaler": self.step.state_values(), **origin}
        save_checkpoint(self.out, step, tensors=tensors, state=state, keep=self.config.train.keep_checkpoints)

    def _save_model(self, step: int) -> None:
        assert self.config.style.image is not None
        metadata = {
            "preset": self.config.preset,
            "style": self.config.style.image.name,
            "style_sha256": self.inputs.style_sha256,
            "steps": str(step),
            "image_size": str(self.config.data.image_size),
            "fastnst_version": __version__,
        }
        remove_leftovers(self.out / MODEL_NAME)
        save_style_model(self.out / MODEL_NAME, self.net, metadata=metadata)

    def _take_over(self, checkpoint: Checkpoint | None) -> None:
        """Go on with rank 0's `checkpoint`, in all processes."""
        checkpoint = shared_checkpoint(checkpoint, self.group)
        if checkpoint is None:
            return
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
        self.done = checkpoint.step

    def _log_changes(self, changes: list[str], step: int) -> None:
        for change in changes:
            self.notify(f"goes on, though {change}")
        if any(change.startswith(_ORDER_CHANGES) for change in changes):
            self.notify(
                f"the order of the images is from now on that of the new values, starting after step {step}: in the "
                "current pass some images may come twice, and others not at all"
            )

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


def shared_checkpoint(checkpoint: Checkpoint | None, group: ProcessGroup) -> Checkpoint | None:
    """Rank 0's `checkpoint`, in all processes: others need not see its files."""
    if group.dist_env.world_size == 1:
        return checkpoint
    head = json.dumps([str(checkpoint.path), checkpoint.step, checkpoint.state]) if checkpoint else ""
    head = group.broadcast(head.encode()).decode()
    if not head:
        return None
    tensors = safetensors.torch.load(group.broadcast(safetensors.torch.save(checkpoint.tensors) if checkpoint else b""))
    path, step, state = json.loads(head)
    return Checkpoint(Path(path), step, tensors, state)
