"""Going on with a run: what a checkpoint knows of its origin, what has changed since, and whether its weights fit.

A resumed run is the one that would have been, had nothing interrupted it, as long as configuration, images, style,
VGG19 and the number of processes are the same. Whatever differs is named, with both values, and ends the attempt unless
it was allowed. What is never allowed is another network.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fastnst.config_text import current_keys
from fastnst.errors import DataError, UserError
from fastnst.training.distributed.process_group import ProcessGroup
from fastnst.training.inputs import Inputs
from fastnst.training.run_dir.checkpoint import Checkpoint, checkpoint_steps, latest_checkpoint
from fastnst.training.run_dir.layout import config_differences, config_values, refuse_another_network

# Each changes which image stands at which place of the run.
_KEYS_OF_THE_ORDER = ("train.seed was", "train.batch_size was", "the images in")


def provenance(inputs: Inputs, *, world_size: int) -> dict[str, Any]:
    """Return what decides the weights of a run, as JSON values that checkpoints keep.

    Args:
        inputs: configuration, images, style and VGG19.
        world_size: processes that share each step.
    """
    return {
        "configuration": config_values(inputs.config),
        "fingerprints": inputs.fingerprints(),
        "pictures": len(inputs.manifest.images),
        "world_size": world_size,
    }


def checkpoint_to_resume(run: Path, notify: Callable[[str], None]) -> Checkpoint | None:
    """The newest valid checkpoint; None if the run ended before its first.

    Args:
        run: the run directory.
        notify: told of each newer checkpoint that is passed over.

    Raises:
        DataError: there are checkpoints, and not one is valid: starting anew would take the place of what may still be
            rescued.
    """
    checkpoint = latest_checkpoint(run, notify)
    if checkpoint is None and (steps := checkpoint_steps(run)):
        raise DataError(
            f"no checkpoint of {run} is valid, of {len(steps)} (steps {', '.join(map(str, steps))}); restore one from "
            "a copy, remove the folder checkpoints to start again at step 0, or start a new run in another --out"
        )
    return checkpoint


def diff_provenance(checkpoint: Checkpoint, now: Mapping[str, Any], *, allow: bool) -> list[str]:
    """What is not as it was when a checkpoint was written, one text for each, with both values.

    Args:
        checkpoint: the one to go on from.
        now: what `provenance` says of this process.
        allow: return the changes instead of raising.

    Raises:
        UserError: the configuration or the number of processes changed, and `allow` is not set.
        DataError: images, style or VGG19 changed, and `allow` is not set; or it is another network in any case; or
            the checkpoint does not tell its origin.
    """
    match checkpoint.state:
        case {
            "configuration": dict(configuration),
            "fingerprints": dict(fingerprints),
            "pictures": int(images),
            "world_size": int(world_size),
        }:
            pass
        case _:
            raise DataError(
                f"{checkpoint.path} does not tell what it was trained with; it is of another version of fastnst. "
                "Start a new run in another --out"
            )
    configuration = current_keys(configuration)
    refuse_another_network(checkpoint.path, configuration, now["configuration"])
    options = config_differences(configuration, now["configuration"])
    if world_size != now["world_size"]:
        options.append(f"the processes that share a step were {world_size}, are now {now['world_size']}")
    files = []
    named = {"data": "the images in the data folder", "style": "the style image", "vgg": "the VGG19 weights"}
    counts = {"data": (f"{images} images, ", f"{now['pictures']} images, ")}
    for key, what in named.items():
        then, today = str(fingerprints.get(key, "unknown")), now["fingerprints"][key]
        if then != today:
            before, after = counts.get(key, ("", ""))
            files.append(
                f"{what} changed since the checkpoint was written ({before}SHA-256 {then[:12]}… then, "
                f"{after}{today[:12]}… now)"
            )
    if (options or files) and not allow:
        remedy = "restore them" if not options else "resume without these options"
        raise (UserError if options else DataError)(
            f"{checkpoint.path} was trained otherwise: {'; '.join(options + files)}; {remedy}, go on all the same by "
            "--allow-changes, or start a new run in another --out"
        )
    return options + files


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


def tell_changes(changes: list[str], step: int, notify: Callable[[str], None]) -> None:
    """List what was allowed to change, and what that means for the order of images."""
    for change in changes:
        notify(f"goes on, though {change}")
    if any(change.startswith(_KEYS_OF_THE_ORDER) for change in changes):
        notify(
            f"the order of the images is from now on that of the new values, entered behind step {step}: in the "
            "current pass some images may come twice, and others not at all"
        )


def check_fits(checkpoint: Checkpoint, net: nn.Module) -> None:
    """Refuse a checkpoint that lacks a tensor of the network or of Adam, or has one of another size.

    Raises:
        DataError: naming the first tensor, and both sizes.
    """
    wanted = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        wanted |= {f"optimizer.{moment}.{name}": parameter for moment in ("exp_avg", "exp_avg_sq")}
        wanted[f"optimizer.step.{name}"] = torch.empty(())
    wanted["rng.cpu"] = torch.get_rng_state()
    for name, tensor in wanted.items():
        found = checkpoint.tensors.get(name)
        if found is None or found.shape != tensor.shape:
            raise DataError(
                f"{checkpoint.path} does not fit this network: {name} is {_size(found)} in it, and {_size(tensor)} "
                "here. Resume with the configuration it was trained with, or start a new run in another --out"
            )


def _size(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(list(tensor.shape))
