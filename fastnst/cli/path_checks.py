"""Check the paths of a command before torch is imported, which takes seconds.

The commands check the same and more; here a mistyped name shows at once.
"""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastnst.config import Config, DataConfig
    from fastnst.training.distributed.environment import DistEnv


def import_phase(rank: int = 0) -> contextlib.AbstractContextManager[None]:
    """Say on rank 0 that torch is being imported, if that takes long."""
    if rank:
        return contextlib.nullcontext()
    from fastnst.progress import phase

    return phase("import PyTorch")


def check_images(paths: Iterable[Path]) -> None:
    """Raise DataError for a path that is no image by its first bytes; folders are left to the command."""
    from fastnst.file_kind import file_group, read_ends
    from fastnst.images import read_image

    for path in paths:
        if path.is_dir():
            continue
        try:
            is_image = file_group(*read_ends(path)) == "image"
        except OSError:
            is_image = False
        if not is_image:
            read_image(path)  # it says why


def check_run(
    config: "Config",
    styles: Mapping[str, Path] | None,
    out: Path,
    dist_env: "DistEnv",
    *,
    resume: bool,
    allow_changes: bool,
) -> None:
    """Check the run directories, then what the run reads, as `train` does; its arguments and errors are the same."""
    from fastnst.training.run_dir.style_folder import MultiStyleDir, run_configs, validate_run_dirs

    configs = run_configs(config, styles, out) if styles else {out: config}
    if dist_env.world_size == 1:  # of several processes only the first sees the run directories
        folder = MultiStyleDir(out, styles) if styles else None
        validate_run_dirs(configs, folder, resume=resume, allow_changes=allow_changes)
    check_inputs(configs.values())


def check_inputs(configs: "Iterable[Config]") -> None:
    """Check the style images, the folder or cache, and the file of VGG19; errors are those of `train`."""
    from fastnst.errors import DataError
    from fastnst.images import printable
    from fastnst.models.files.early_checks import check_vgg19

    first, *_ = configs = list(configs)
    images = [config.style.image for config in configs]
    for image in images:
        if image is not None and image.is_dir():
            raise DataError(f"the style image {printable(image)} is a folder; give one image with --style IMAGE")
    check_images(image for image in images if image is not None)
    check_data(first.data)
    check_vgg19(first.loss.vgg)


def check_data(config: "DataConfig") -> None:
    """Raise DataError unless `data.folder` is a folder, and, of a cache, unless it has the run's size and fit."""
    from fastnst.data.cache.format import check_matches, is_cache, read_head
    from fastnst.data.folder import check_folder

    folder = check_folder(config.folder)
    if is_cache(folder) and (head := read_head(folder)) is not None:
        check_matches(head, size=config.image_size, fit=config.fit)
