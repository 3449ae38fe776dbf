"""The output folder of several styles that are trained together.

styles.json     style name → style image, written before the first run directory
NAME/           an ordinary run directory per style
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastnst.config import Config
from fastnst.errors import DataError, UserError, shell_quote
from fastnst.images import explain_os_error, printable
from fastnst.storage import LOCK_NAMES, is_leftover, remove_leftovers, storage_error, write_atomic
from fastnst.training.run_dir.layout import CONFIG_NAME, validate_run_dir

STYLES_NAME = "styles.json"
LARGEST_FILE = 1 << 22
"""Bytes of `styles.json`; a thousand styles take about 100 thousand."""


class MultiStyleDir:
    """Validate and write the folder `out` of several styles (name → image)."""

    def __init__(self, out: Path, styles: Mapping[str, Path]) -> None:
        self._out, self._styles = out, dict(styles)

    def validate(self, *, resume: bool) -> None:
        """Check that these styles may be trained here; writes nothing.

        Raises:
            UserError: the folder is not empty, or with `resume` has other styles.
            DataError: the folder cannot be read.
        """
        out = printable(self._out)
        try:
            names = sorted(entry.name for entry in self._out.iterdir()) if self._out.exists() else []
        except OSError as error:
            raise storage_error(self._out, error) from error
        if CONFIG_NAME in names:
            raise UserError(
                f"{out} holds the run of one style, and {len(self._styles)} are given; choose another --out"
            )
        begun = saved_styles(self._out)
        if resume:
            if begun is None:
                raise UserError(f"{out} holds no styles to resume ({STYLES_NAME} is missing); start without --resume")
            if begun.keys() != self._styles.keys():
                raise UserError(
                    f"{out} was begun with the styles {_listed(begun)}, and {_listed(self._styles)} are given; resume "
                    "without --style, or start new runs in another --out"
                )
            return
        if begun is not None and any(_has_config(self._out / name) for name in begun):
            raise UserError(
                f"{out} holds runs of the styles {_listed(begun)}; go on with them by --resume, or choose another --out"
            )
        if present := [name for name in names if name != STYLES_NAME and not _is_nothing(self._out / name)]:
            raise UserError(f"{out} is not empty (it holds {present[0]!r}); choose another --out")

    def write_styles(self) -> None:
        """Write `styles.json`; raises StorageError if that fails."""
        remove_leftovers(self._out / STYLES_NAME)
        paths = {name: str(image) for name, image in self._styles.items()}
        write_atomic(self._out / STYLES_NAME, (json.dumps(paths, indent=2) + "\n").encode())


def style_names(images: Sequence[Path]) -> dict[str, Path]:
    """Return style name → image; the name is the image's stem and names the run directory.

    Raises:
        UserError: two images have the same stem.
    """
    styles: dict[str, Path] = {}
    for image in images:
        name = image.stem
        if name in styles:
            same = printable(styles[name]) if styles[name] != image else "itself"
            raise UserError(
                f"--style {printable(image)} would have the same run directory as {same}: "
                f"{printable(name)!r}; give each style once, and rename one of two images of the same name"
            )
        styles[name] = image
    return styles


def run_configs(config: Config, styles: Mapping[str, Path], out: Path) -> dict[Path, Config]:
    """Return run directory → configuration, in the order of `styles`."""
    configs = {}
    for name, image in styles.items():
        style = config.style.model_copy(update={"image": image})
        configs[out / name] = config.model_copy(update={"style": style})
    return configs


def validate_run_dirs(
    configs: Mapping[Path, Config], folder: MultiStyleDir | None, *, resume: bool, allow_changes: bool
) -> list[list[str]]:
    """Check the run directories of one style, or of several in `folder`; see `validate_run_dir`.

    Returns:
        For each run, what differs from its saved configuration.
    """
    if folder is not None:
        folder.validate(resume=resume)
    # A killed process may have started only some of the styles.
    return [
        validate_run_dir(
            run, config, resume=resume and (folder is None or _has_config(run)), allow_changes=allow_changes
        )
        for run, config in configs.items()
    ]


def saved_styles(out: Path) -> dict[str, Path] | None:
    """Read style name → image from `styles.json`; None if there is no such file.

    Raises:
        DataError: the file is damaged or cannot be read.
    """
    path = out / STYLES_NAME
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {printable(path)}: {explain_os_error(error)}") from error
    try:
        if len(content) > LARGEST_FILE:
            raise ValueError("too long")
        styles = json.loads(content)
        if not isinstance(styles, dict) or not styles:
            raise TypeError("not an object")
        for name, image in styles.items():
            # A name must not lead out of the folder.
            if not isinstance(image, str) or Path(name).name != name or name == ".." or "\0" in name:
                raise ValueError("not a name and an image")
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{printable(path)} is damaged; go on with each style by "
            f"fastnst train --resume --out {shell_quote(out)}/NAME"
        ) from error
    return {name: Path(image) for name, image in styles.items()}


def _has_config(run: Path) -> bool:
    return (run / CONFIG_NAME).is_file()


def _is_nothing(path: Path) -> bool:
    """Return whether `path` is all that a process killed at its start leaves: locks, temporary files, empty folders."""
    if path.name in LOCK_NAMES or is_leftover(path.name):
        return True
    try:
        return path.is_dir() and not path.is_symlink() and all(_is_nothing(inside) for inside in path.iterdir())
    except OSError:
        return False


def _listed(names: Mapping[str, Path]) -> str:
    return ", ".join(printable(name) for name in names)
