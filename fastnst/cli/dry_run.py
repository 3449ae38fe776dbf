"""`fastnst train --dry-run`: print configuration, data, memory and disk of a run without starting it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch

    from fastnst.config import Config
    from fastnst.training.distributed.environment import DistEnv, LocalConfig
    from fastnst.training.memory.estimate import Estimate


def print_plan(
    config: "Config",
    styles: Mapping[str, Path] | None,
    out: Path,
    dist_env: "DistEnv",
    *,
    resume: bool,
    allow_changes: bool,
) -> None:
    """Print what a run would need, and write nothing; the arguments are those of `train`.

    Raises:
        UserError: what would keep the run from starting.
    """
    from fastnst.config import to_toml
    from fastnst.models.weights import describe_source
    from fastnst.progress import byte_count
    from fastnst.training.distributed.environment import check_divisible, local_config
    from fastnst.training.inputs import check_batch, log_rejected, read_manifest, read_style, resolve, total_steps
    from fastnst.training.memory.estimate import estimate
    from fastnst.training.run_dir.layout import moves
    from fastnst.training.run_dir.style_folder import MultiStyleDir, run_configs, validate_run_dirs

    folder = MultiStyleDir(out, styles) if styles else None
    configs = run_configs(config, styles, out) if styles else {out: config}
    configs = {run: resolve(own)[0] for run, own in configs.items()}
    config, device = resolve(next(iter(configs.values())))
    check_divisible(config, dist_env)
    changes = validate_run_dirs(configs, folder, resume=resume, allow_changes=allow_changes)
    images = [(own.style.image, read_style(own.style)[0]) for own in configs.values()]
    manifest = read_manifest(config.data)
    log_rejected(manifest)
    num_images = len(manifest.images)
    check_batch(config, num_images)
    steps = total_steps(config.train, num_images)
    share, processes = local_config(config, dist_env), dist_env.world_size
    need = estimate(share, device_type=device.type, styles=len(configs))
    click.echo(to_toml(config))
    for (run, own), own_changes in zip(configs.items(), changes, strict=True):
        style_name = "" if folder is None else f"{run.name}: "
        for change in own_changes:
            click.echo(f"# changed    {style_name}{change}")
        for move in moves(run, own) if resume else []:
            click.echo(f"# moved      {style_name}{move}; the run stops if the content differs")
    for image, style in images:
        click.echo(f"# style      {image}, {style.shape[3]}x{style.shape[2]} px")
    if folder is not None:
        click.echo(f"# styles     {len(configs)}, trained together; style.image above is that of the first")
    click.echo(f"# data       {len(manifest.images)} images, {len(manifest.rejected)} refused, in {config.data.folder}")
    click.echo(f"# VGG19      {describe_source(config.loss.vgg)}")
    passes = steps * config.train.batch_size / num_images
    click.echo(f"# steps      {steps} of {config.train.batch_size} images, {passes:.2f} passes over the data")
    if processes > 1:
        click.echo(f"# processes  {processes}, {share.train.batch_size} images of a step in each")
    click.echo(f"# device     {device}, {config.train.precision}")
    _print_memory(share, need, device, dist_env, styles=len(configs))
    click.echo(f"# disk       {byte_count(need.disk)} in {out}, and the log")
    click.echo("# dry run: nothing was written")


def _print_memory(
    config: "LocalConfig", need: "Estimate", device: "torch.device", dist_env: "DistEnv", *, styles: int
) -> None:
    from fastnst.progress import byte_count
    from fastnst.training.memory.advice import available_memory_per_process, describe_shortage

    click.echo(
        f"# memory     {byte_count(need.memory)}: weights, gradients and Adam {byte_count(need.weights)}, "
        f"activations {byte_count(need.activations)}; workspaces come on top"
    )
    available = available_memory_per_process(device, dist_env)
    shortage = describe_shortage(
        config, need, available, device_type=device.type, processes=dist_env.world_size, styles=styles
    )
    if shortage:
        click.echo(f"# warning    memory: {shortage}")
