"""Resume a run: find its checkpoint, compare its provenance with today's, check that its tensors fit.

A resumed run equals an uninterrupted one bit for bit as long as configuration, images, style, VGG19 and world size are
unchanged. Every difference is reported with both values and refused without `--allow-changes`; another architecture is
always refused. Images, style and VGG19 may lie elsewhere than before, as long as their content is the same.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastnst.config_text import current_keys
from fastnst.errors import DataError, UserError
from fastnst.training.inputs import Inputs
from fastnst.training.run_dir.checkpoint import Checkpoint, checkpoint_steps, latest_checkpoint
from fastnst.training.run_dir.layout import (
    PATH_KEYS,
    config_differences,
    config_values,
    difference,
    refuse_another_network,
)


def provenance(inputs: Inputs, *, world_size: int) -> dict[str, Any]:
    """Return everything that determines a run's weights, as JSON values for its checkpoints."""
    return {
        "configuration": config_values(inputs.config),
        "fingerprints": inputs.fingerprints(),
        "pictures": len(inputs.manifest.images),
        "world_size": world_size,
    }


def checkpoint_to_resume(run: Path) -> Checkpoint | None:
    """Load the newest valid checkpoint; None if the run ended before its first.

    Raises:
        DataError: no checkpoint is valid; restarting at step 0 would overwrite what might still be recovered.
    """
    checkpoint = latest_checkpoint(run)
    if checkpoint is None and (steps := checkpoint_steps(run)):
        raise DataError(
            f"no checkpoint of {run} is valid, of {len(steps)} (steps {', '.join(map(str, steps))}); restore one from "
            "a copy, remove the folder checkpoints to start again at step 0, or start a new run in another --out"
        )
    return checkpoint


def diff_provenance(checkpoint: Checkpoint, now: Mapping[str, Any], *, allow: bool) -> list[str]:
    """Describe each difference between a checkpoint's and today's `provenance`, with both values.

    Raises:
        UserError: configuration or world size changed, and `allow` is false.
        DataError: images, style or VGG19 changed, and `allow` is false; or the architecture changed; or the checkpoint
            has no provenance.
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
                f"{checkpoint.path} does not say what it was trained with; another version of fastnst wrote it. "
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
            place = next(name for name, fingerprint in PATH_KEYS.items() if fingerprint == key)
            if configuration.get(place) != now["configuration"][place]:
                files.append(difference(place, configuration, now["configuration"]))
            files.append(
                f"{what} changed since the checkpoint was written ({before}SHA-256 {then[:12]}… then, "
                f"{after}{today[:12]}… now)"
            )
    if (options or files) and not allow:
        remedy = "restore them" if not options else "resume without these options"
        raise (UserError if options else DataError)(
            f"{checkpoint.path} was trained otherwise: {'; '.join(options + files)}; {remedy}, accept the changes with "
            "--allow-changes, or start a new run in another --out"
        )
    return options + files


def moved_paths(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe each path that differs between two `provenance`s, though what lies there is the same.

    Args:
        before: of a checkpoint, or of a run without one: just its `configuration`; then nothing can be compared.
        now: today's.
    """
    configuration, fingerprints = current_keys(before["configuration"]), before.get("fingerprints")
    notes = []
    for key, name in PATH_KEYS.items():
        if configuration.get(key) == now["configuration"][key]:
            continue
        if fingerprints is None:
            notes.append(f"{difference(key, configuration, now['configuration'])}; no checkpoint was made from the old")
        elif fingerprints.get(name) == now["fingerprints"][name]:
            notes.append(f"{difference(key, configuration, now['configuration'])}, with the same content")
    return notes


def check_fits(checkpoint: Checkpoint, net: nn.Module) -> None:
    """Check that a checkpoint has every tensor of the network and of Adam, in its shape.

    Raises:
        DataError: naming the first tensor that does not fit, with both shapes.
    """
    wanted = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        wanted |= {f"optimizer.{moment}.{name}": parameter for moment in ("exp_avg", "exp_avg_sq")}
        wanted[f"optimizer.step.{name}"] = torch.empty(())
    wanted["rng.cpu"] = torch.get_rng_state()
    for name, tensor in wanted.items():
        found = checkpoint.tensors.get(name)
        if found is None or found.shape != tensor.shape:
            there = "missing" if found is None else str(list(found.shape))
            raise DataError(
                f"{checkpoint.path} does not fit this network: {name} is {there} in it, and {list(tensor.shape)} "
                "here. Resume with the configuration it was trained with, or start a new run in another --out"
            )
