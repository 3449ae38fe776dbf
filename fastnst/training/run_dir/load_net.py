"""The transform net of a run as it was at one of its checkpoints."""

import re
from pathlib import Path

import torch

from fastnst.errors import DataError
from fastnst.images import printable
from fastnst.models.style_model import read_style_metadata
from fastnst.models.transform_net import TransformNet
from fastnst.training.run_dir.checkpoint import FOLDER, checkpoint_steps, load_checkpoint
from fastnst.training.run_dir.layout import CONFIG_NAME, saved_config


def check_run(run: Path) -> None:
    """DataError unless `run` is the directory of a run."""
    if not (run / CONFIG_NAME).is_file():
        raise DataError(
            f"{printable(run)} is no run directory ({CONFIG_NAME} is missing); give one that fastnst train has written"
        )


def steps_of_run(run: Path) -> int:
    """Steps that a run's style model was trained for; 0 where there is no model yet, or it does not say."""
    try:
        steps = read_style_metadata(run).get("steps", "")
    except DataError:
        return 0
    return int(steps) if re.fullmatch(r"[0-9]{1,18}", steps) else 0


def load_checkpoint_net(run: Path, step: int) -> TransformNet:
    """The transform net as it was after `step` steps.

    Args:
        run: the run directory.
        step: of one of its checkpoints.

    Returns:
        The network on the CPU, in evaluation mode, its parameters without gradients.

    Raises:
        DataError: not a run, no checkpoint of that step (the message names those that are there), or a damaged one.
    """
    check_run(run)
    there = checkpoint_steps(run)
    if step not in there:
        have = ", ".join(map(str, there)) if there else "none"
        raise DataError(f"{printable(run)} has no checkpoint of step {step}; its checkpoints: {have}")
    checkpoint = load_checkpoint(run / FOLDER / f"step_{step:08d}")
    config = saved_config(run)
    weights = {
        name.removeprefix("model."): tensor for name, tensor in checkpoint.tensors.items() if name.startswith("model.")
    }
    # The weights to be replaced are drawn at random, which must not disturb anybody's seed.
    with torch.random.fork_rng(devices=[]):
        net = TransformNet(config.model.architecture, config.model.norm)
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(
            f"{printable(checkpoint.path)} holds other weights than a {net.architecture} net with {net.norm} norm, "
            f"which {CONFIG_NAME} names; one of them was exchanged"
        ) from error
    return net.eval().requires_grad_(False)
