"""A folder of runs that were trained together, one for each style.

styles.json     name → style image, written before the first of
NAME/           a run directory like any other, for each style
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastnst.config import Config
from fastnst.errors import DataError, UserError
from fastnst.images import explain_os_error, printable
from fastnst.storage import LOCK_NAME, is_leftover, remove_leftovers, storage_error, write_atomic
from fastnst.training.run_dir.layout import CONFIG_NAME, prepare_run

STYLES_NAME = "styles.json"
LARGEST_FILE = 1 << 22
"""Bytes of `styles.json`; a thousand styles have some 100 thousand."""


class MultiStyleDir:
    """What `--out` names where several styles are trained.

    Args:
        out: the folder.
        styles: name → image.
    """

    def __init__(self, out: Path, styles: Mapping[str, Path]) -> None:
        self._out, self._styles = out, dict(styles)

    def has_begun(self, run: Path) -> bool:
        """Whether a style's run directory holds something to go on from."""
        return (run / CONFIG_NAME).is_file()

    def check(self, *, resume: bool) -> None:
        """Whether these styles may be trained here; makes nothing.

        Args:
            resume: go on with what is there.

        Raises:
            UserError: new styles in a folder that holds something, or other styles than it was begun with.
            DataError: the folder cannot be looked into.
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
        if begun is not None and any(self.has_begun(self._out / name) for name in begun):
            raise UserError(
                f"{out} holds runs of the styles {_listed(begun)}; go on with them by --resume, or choose another --out"
            )
        if present := [name for name in names if name != STYLES_NAME and not _is_nothing(self._out / name)]:
            raise UserError(f"{out} is not empty (it holds {present[0]!r}); choose another --out")

    def write(self) -> None:
        """Note the styles, before the first of them begins.

        Raises:
            StorageError: the storage refuses.
        """
        remove_leftovers(self._out / STYLES_NAME)
        paths = {name: str(image) for name, image in self._styles.items()}
        write_atomic(self._out / STYLES_NAME, (json.dumps(paths, indent=2) + "\n").encode())


def style_names(images: Sequence[Path]) -> dict[str, Path]:
    """Name → image, in the same order: the file's name without its suffix, which names the run directory.

    Raises:
        UserError: two of them have the same name.
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
    """Run directory → configuration of each style, in the order of `styles`."""
    configs = {}
    for name, image in styles.items():
        style = config.style.model_copy(update={"image": image})
        configs[out / name] = config.model_copy(update={"style": style})
    return configs


def validate_run_dirs(
    configs: Mapping[Path, Config], folder: MultiStyleDir | None, *, resume: bool, allow_changes: bool
) -> list[list[str]]:
    """Check that the run directories may hold these runs; makes nothing.

    Args:
        configs: by run directory.
        folder: that holds them; None for one run alone.
        resume: go on with what is there.
        allow_changes: with other configurations, too.

    Returns:
        For each run what differs from its saved configuration.

    Raises:
        UserError: as `prepare_run` and `MultiStyleDir.check`.
        DataError: likewise.
    """
    if folder is not None:
        folder.check(resume=resume)
    # Of several styles, some may not have come to their first line.
    return [
        prepare_run(
            run,
            config,
            resume=resume and (folder is None or folder.has_begun(run)),
            allow_changes=allow_changes,
        )
        for run, config in configs.items()
    ]


def saved_styles(out: Path) -> dict[str, Path] | None:
    """The styles that a folder was begun with, by name; None if it was not begun with several.

    Raises:
        DataError: `styles.json` is damaged or cannot be read.
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
            f"{printable(path)} is damaged; go on with each style by fastnst train --resume --out {printable(out)}/NAME"
        ) from error
    return {name: Path(image) for name, image in styles.items()}


def _is_nothing(path: Path) -> bool:
    """What a process leaves that is killed before its first line: nothing worth keeping."""
    if path.name == LOCK_NAME or is_leftover(path.name):
        return True
    try:
        return path.is_dir() and not path.is_symlink() and all(_is_nothing(inside) for inside in path.iterdir())
    except OSError:
        return False


def _listed(names: Mapping[str, Path]) -> str:
    return ", ".join(printable(name) for name in names)
