"""One style of a run: its net and loss, its run directory and its log."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from fastnst import __version__
from fastnst.config import to_toml
from fastnst.data.replacements import REJECTED_NAME, ReadFailure
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
from fastnst.training.run_dir.layout import CONFIG_NAME, config_values, saved_config
from fastnst.training.run_dir.load_net import steps_of_run
from fastnst.training.run_dir.rejected_images import RejectedImages
from fastnst.training.run_dir.resume import (
    check_fits,
    checkpoint_to_resume,
    diff_provenance,
    moved_paths,
    provenance,
)
from fastnst.training.step.train_step import NetTrainer

if TYPE_CHECKING:
    from tensorboard.compat.proto.graph_pb2 import GraphDef

log = logging.getLogger(__name__)

# Each changes which image stands at which place of the run.
_ORDER_CHANGES = ("train.seed was", "train.batch_size was", "the images in")


class StyleLog(logging.LoggerAdapter[logging.Logger]):
    """Begins each message with the style's name, in a run of several."""

    def __init__(self, name: str | None) -> None:
        super().__init__(log)
        self._name = name

    def log(self, level: int, msg: object, *args: object, **options: Any) -> None:
        if self._name is None:
            self.logger.log(level, msg, *args, **options)
        else:
            self.logger.log(level, f"%s: {msg}", self._name, *args, **options)


class StyleRun:
    """One style in one process of the run; only rank 0 writes.

    Args:
        inputs: configuration, style image, training images and VGG19.
        out: the run directory, locked by rank 0.
        group: the processes that share the run.
        name: of the style, if there are several.
        shared_vgg: the trainer of another style of the run; φ's prepared weights are kept once.
    """

    def __init__(
        self,
        inputs: Inputs,
        out: Path,
        group: ProcessGroup,
        *,
        name: str | None = None,
        shared_vgg: NetTrainer | None = None,
    ) -> None:
        self.inputs, self.out, self.group = inputs, out, group
        self.messages = StyleLog(name)
        self.config, self.device = inputs.config, inputs.device
        config, device = self.config, self.device
        # Before each net: a style's weights begin as they would in a run of its own.
        torch.manual_seed(config.train.seed)
        self.net = TransformNet(config.model.architecture, config.model.norm)
        self.net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.net.train()
        self.loss = PerceptualLoss(inputs.vgg, config.loss).to(device=device)
        self.loss.set_style(inputs.style.to(device))
        parallel = group.data_parallel(self.net, device, config.data.image_size)
        self.net_trainer = NetTrainer(
            self.net, self.loss, config.train, device, parallel=parallel, shared_vgg=shared_vgg
        )
        self.monitor = DivergenceMonitor(self.net_trainer, config.train, group, out)
        self.samples = SampleLogger(inputs, self.net, self.loss) if group.is_rank_zero else None
        self.run_log: RunLog | None = None
        self.done = 0
        """Steps that are done already."""

    def restore(self, changes: list[str], *, allow_changes: bool) -> None:
        """Load the newest valid checkpoint, if there is one.

        Args:
            changes: differences from the run's saved configuration.
            allow_changes: accept differences from what the checkpoint was trained with.
        """
        if not self.group.is_rank_zero:
            self._load(None)
            return
        checkpoint = checkpoint_to_resume(self.out)
        now = provenance(self.inputs, world_size=self.group.dist_env.world_size)
        if checkpoint is None:
            begun = self.out / CONFIG_NAME
            before = {"configuration": config_values(saved_config(self.out))} if begun.is_file() else now
            self._log_moved(moved_paths(before, now))
            self._log_changes(changes, 0)
            self.messages.info("%s holds no checkpoint yet; starting at step 0", self.out)
            self._load(None)
            return
        changes = diff_provenance(checkpoint, now, allow=allow_changes)
        self._log_moved(moved_paths(checkpoint.state, now))
        check_fits(checkpoint, self.net)
        self._load(checkpoint)
        self._log_changes(changes, checkpoint.step)
        # A process may have been killed between the checkpoint and the style model, which is written after it. Allowed
        # changes are saved, so that they need not be allowed again.
        if changes:
            self._save_checkpoint(checkpoint.step)
        if changes or steps_of_run(self.out) != checkpoint.step:
            self._save_model(checkpoint.step)
        remove_old_checkpoints(self.out, checkpoint.step, keep=self.config.train.keep_checkpoints)

    def prepare(self, failures: Sequence[ReadFailure], *, quiet: bool = False) -> RejectedImages:
        """Write the configuration and the list of rejected images; return the list, for further ones.

        Args:
            failures: images that are known to have failed in training.
            quiet: do not log further ones; another style of the run does.
        """
        for name in (CONFIG_NAME, REJECTED_NAME, METRICS_NAME):
            remove_leftovers(self.out / name)
        write_atomic(self.out / CONFIG_NAME, to_toml(self.config).encode())
        return RejectedImages(self.out, self.inputs.manifest, failures, quiet=quiet)

    def log_start(self, graph: "GraphDef | None") -> "GraphDef | None":
        """In a run that begins, log what does not change; pass the returned graph to the next style."""
        if self.samples is None or self.run_log is None or self.done:
            return graph
        return self.samples.log_start(self.run_log, graph)

    def log_summary(self) -> None:
        """At the end of a run in fp16, log how many steps were skipped."""
        if self.net_trainer.scaler.is_enabled():
            self.messages.info(
                "fp16: %d of %d steps skipped, since a gradient overflowed; the loss scale is now %g",
                self.net_trainer.skipped_steps.read()[0],
                self.inputs.steps,
                self.net_trainer.scaler.get_scale(),
            )

    def log_metrics(self, step: int, terms: LossTerms, speed: Callable[[], Mapping[str, float]]) -> str:
        """Log a step's terms, averaged over all ranks; return the loss for the progress bar."""
        scalars = self.group.all_reduce_mean(loss_scalars(terms))
        self.monitor.check_steps(step)
        if self.run_log is not None:
            self.run_log.metrics(step, scalars | self._training_scalars() | dict(speed()))
        skipped = self.net_trainer.skipped_steps.read()[0] if self.net_trainer.scaler.is_enabled() else 0
        return f"{scalars['loss/total']:.4g}" + (f", {skipped} skipped" if skipped else "")

    def show_and_save(self, step: int, *, samples: bool, projections: bool, checkpoint: bool) -> None:
        """Log and save what is due after `step`."""
        if samples or projections or checkpoint:
            self.monitor.check_state(step)
        if self.run_log is not None and self.samples is not None:
            if samples:
                self.samples.log_samples(self.run_log, step)
            if projections:
                self.samples.log_projections(self.run_log, step)
            if checkpoint:
                self._save(self.run_log, step)

    def _save(self, run_log: RunLog, step: int) -> None:
        # In this order: a checkpoint follows the log of its steps, and a style model follows its checkpoint.
        run_log.flush()
        self._save_checkpoint(step)
        self._save_model(step)

    def _save_checkpoint(self, step: int) -> None:
        tensors = self.net_trainer.state_tensors()
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        origin = provenance(self.inputs, world_size=self.group.dist_env.world_size)
        state = {"scaler": self.net_trainer.state_values(), **origin}
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

    def _load(self, checkpoint: Checkpoint | None) -> None:
        """Load rank 0's checkpoint on every rank."""
        checkpoint = _broadcast_checkpoint(checkpoint, self.group)
        if checkpoint is None:
            return
        try:
            self.net_trainer.load_state(checkpoint.tensors, checkpoint.state["scaler"])
            torch.set_rng_state(checkpoint.tensors["rng.cpu"])
            if self.device.type == "cuda" and "rng.cuda" in checkpoint.tensors:
                torch.cuda.set_rng_state(checkpoint.tensors["rng.cuda"], self.device)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            # The file is intact, but something else wrote it.
            if ran_out_of_memory(error):
                raise
            raise DataError(
                f"{checkpoint.path} holds no state that training can go on from ({str(error)[:200]}); remove it to go "
                "on from an older one, or start a new run in another --out"
            ) from error
        self.done = checkpoint.step

    def _log_moved(self, notes: Sequence[str]) -> None:
        for note in notes:
            self.messages.info("goes on: %s", note)

    def _log_changes(self, changes: list[str], step: int) -> None:
        """List what was allowed to change, and what that means for the order of images."""
        for change in changes:
            self.messages.warning("goes on, though %s", change)
        if any(change.startswith(_ORDER_CHANGES) for change in changes):
            self.messages.warning(
                "the order of the images is from now on that of the new values, starting after step %d: in the current "
                "pass some images may come twice, and others not at all",
                step,
            )

    def _training_scalars(self) -> dict[str, float]:
        scalars = {"train/learning_rate": self.config.train.learning_rate}
        if self.net_trainer.scaler.is_enabled():
            scalars["train/loss_scale"] = float(self.net_trainer.scaler.get_scale())
            scalars["train/skipped_steps"] = self.net_trainer.skipped_steps.read()[0]
        if self.device.type == "cuda":
            scalars["memory/peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return scalars


def _broadcast_checkpoint(checkpoint: Checkpoint | None, group: ProcessGroup) -> Checkpoint | None:
    """Return rank 0's `checkpoint` on all ranks: others need not see its files."""
    if group.dist_env.world_size == 1:
        return checkpoint
    head = json.dumps([str(checkpoint.path), checkpoint.step, checkpoint.state]) if checkpoint else ""
    head = group.broadcast(head.encode()).decode()
    if not head:
        return None
    tensors = safetensors.torch.load(group.broadcast(safetensors.torch.save(checkpoint.tensors) if checkpoint else b""))
    path, step, state = json.loads(head)
    return Checkpoint(Path(path), step, tensors, state)
