"""File names of a run directory, and which configuration may resume in it."""

from collections.abc import Mapping
from pathlib import Path

from fastnst.config import SECTIONS, Config, load_config
from fastnst.config_text import toml_value
from fastnst.errors import DataError, UserError
from fastnst.images import printable
from fastnst.storage import LOCK_NAMES, is_leftover, storage_error

CONFIG_NAME = "config.toml"

CHANGEABLE_KEYS = frozenset(
    {
        "train.steps",
        "train.epochs",
        "train.log_every",
        "train.sample_every",
        "train.samples",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.max_skipped_steps",
        "train.capture",
        "data.workers",
        "data.prefetch",
        "data.max_failed_percent",
    }
)
"""Keys that, like all of `visualize`, never affect the weights at a given step: a resumed run may change them.

`train.capture` is one: a captured step runs the same kernels on the same numbers as a launched one."""

PATH_KEYS = {"data.folder": "data", "style.image": "style", "loss.vgg": "vgg"}
"""Keys that say where something lies → its fingerprint (`Inputs.fingerprints`): the content counts, not the place."""

ARCHITECTURE_KEYS = ("model.architecture", "model.norm")
"""Keys whose change makes trained weights unusable."""


def validate_run_dir(out: Path, config: Config, *, resume: bool, allow_changes: bool = False) -> list[str]:
    """Check that a run with `config` may start, or resume, in `out`; writes nothing.

    Returns:
        What differs from the saved configuration, accepted with `allow_changes`; see `config_differences`.

    Raises:
        UserError: a new run, and `out` is not empty; or a resumed run with another configuration.
        DataError: `out` cannot be read, or its weights belong to another architecture.
    """
    try:
        names = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    except OSError as error:
        raise storage_error(out, error) from error
    if not resume:
        # A process killed right at its start leaves nothing that could be resumed or is worth keeping.
        present = [name for name in names if name not in LOCK_NAMES and not is_leftover(name)]
        if CONFIG_NAME in present:
            raise UserError(f"{out} holds another run; go on with it by --resume, or choose another --out")
        if present:
            raise UserError(f"{out} is not empty (it holds {present[0]!r}); choose another --out")
        return []
    before, now = config_values(saved_config(out)), config_values(config)
    refuse_another_network(out, before, now)
    differences = config_differences(before, now)
    if differences and not allow_changes:
        raise UserError(
            f"{out} was begun with another configuration: {'; '.join(differences)}. Resume without these options, "
            "accept the changes with --allow-changes, or start a new run in another --out"
        )
    return differences


def check_run(run: Path) -> None:
    """Raise DataError unless `run` is a run directory."""
    if not (run / CONFIG_NAME).is_file():
        raise DataError(
            f"{printable(run)} is no run directory ({CONFIG_NAME} is missing); give one that fastnst train has written"
        )


def saved_config(run: Path) -> Config:
    """Read the configuration with which a run was started or last resumed."""
    path = run / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{run} holds no run to resume ({CONFIG_NAME} is missing); start one without --resume")
    return load_config(file=path, is_saved=True, environment={})


def config_values(config: Config) -> dict[str, str]:
    """Return dotted key → value as TOML for every key, the form that checkpoints keep."""
    values = {"preset": toml_value(config.preset)}
    for section in SECTIONS:
        values |= {f"{section}.{key}": toml_value(value) for key, value in getattr(config, section)}
    return values


def config_differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return `section.key was A, is now B` for each key that affects the weights and differs; see `config_values`.

    Paths are left out: `resume.diff_provenance` compares what lies there.
    """
    free = CHANGEABLE_KEYS | PATH_KEYS.keys()
    keys = [key for key in {**now, **before} if key not in free and not key.startswith("visualize.")]
    return [difference(key, before, now) for key in keys if before.get(key) != now.get(key)]


def moves(run: Path, config: Config) -> list[str]:
    """Return `section.key was A, is now B` for each path that differs from the saved configuration, if there is one."""
    if not (run / CONFIG_NAME).is_file():
        return []
    before, now = config_values(saved_config(run)), config_values(config)
    return [difference(key, before, now) for key in PATH_KEYS if before[key] != now[key]]


def difference(key: str, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return `section.key was A, is now B`."""
    return f"{key} was {before.get(key, 'unknown')}, is now {now.get(key, 'unknown')}"


def refuse_another_network(where: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise DataError if the weights in `where` have another architecture than the run; see `config_values`."""
    fixed = [{key: values[key] for key in ARCHITECTURE_KEYS if key in values} for values in (before, now)]
    if differences := config_differences(*fixed):
        raise DataError(
            f"the weights in {where} are those of another network: {'; '.join(sorted(differences))}; they cannot go on "
            "in this one. Resume without these options, or start a new run in another --out"
        )
