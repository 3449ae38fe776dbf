"""Load the transform net from a run's checkpoint."""

import re
from pathlib import Path

import torch

from fastnst.errors import DataError
from fastnst.images import printable
from fastnst.models.style_model import read_style_metadata
from fastnst.models.transform_net import TransformNet
from fastnst.training.run_dir.checkpoint import FOLDER, checkpoint_steps, load_checkpoint
from fastnst.training.run_dir.layout import CONFIG_NAME, check_run, saved_config


def steps_of_run(run: Path) -> int:
    """Return the steps of a run's style model; 0 without a model or if its metadata does not say."""
    try:
        steps = read_style_metadata(run).get("steps", "")
    except DataError:
        return 0
    return int(steps) if re.fullmatch(r"[0-9]{1,18}", steps) else 0


def load_checkpoint_net(run: Path, step: int) -> TransformNet:
    """Load the transform net of the checkpoint after `step` steps, on the CPU, in eval mode, without gradients.

    Raises:
        DataError: no run, no checkpoint of that step (the message lists the existing ones), or a damaged one.
    """
    check_run(run)
    steps = checkpoint_steps(run)
    if step not in steps:
        existing = ", ".join(map(str, steps)) or "none"
        raise DataError(f"{printable(run)} has no checkpoint of step {step}; its checkpoints: {existing}")
    checkpoint = load_checkpoint(run / FOLDER / f"step_{step:08d}")
    config = saved_config(run)
    weights = {
        name.removeprefix("model."): tensor for name, tensor in checkpoint.tensors.items() if name.startswith("model.")
    }
    # The initial weights, replaced below, must not advance the global random generator.
    with torch.random.fork_rng(devices=[]):
        net = TransformNet(config.model.architecture, config.model.norm)
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(
            f"{printable(checkpoint.path)} does not hold the weights of a {net.architecture} net with {net.norm} "
            f"norm, as {CONFIG_NAME} says; one of them was replaced"
        ) from error
    return net.eval().requires_grad_(False)
