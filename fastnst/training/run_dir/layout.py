"""What a run directory holds, when one may be used, and what must be equal to go on with one."""

from collections.abc import Mapping
from pathlib import Path

from fastnst.config import Config, Section, VisualizeConfig, load_config
from fastnst.config_text import toml_value
from fastnst.errors import DataError, UserError
from fastnst.storage import LOCK_NAME, is_leftover, storage_error

CONFIG_NAME = "config.toml"
REJECTED_NAME = "rejected.jsonl"

# Keys that change how a run is fed, watched or how long it is, never the weights at a given step. A captured step is
# replayed with the kernels and the numbers of one that is launched: `train.capture` decides what the processor does.
FREE_KEYS = frozenset(
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
        *(f"visualize.{key}" for key in VisualizeConfig.model_fields),
    }
)


# Keys whose change makes another network: trained weights do not fit, or mean something else.
FIXED_KEYS = frozenset({"model.architecture", "model.norm"})


def prepare_run(out: Path, config: Config, *, resume: bool, allow_changes: bool = False) -> list[str]:
    """Check that `out` may hold this run; makes nothing.

    Args:
        out: the run directory.
        config: what the run is to be from now on.
        resume: go on with the run that `out` holds.
        allow_changes: go on with another configuration too.

    Returns:
        What differs from the run's saved configuration, as `config_differences` says it.

    Raises:
        UserError: a new run into a directory that holds something, or a resumed one that differs.
        DataError: `out` cannot be looked into, or its weights are those of another network.
    """
    try:
        names = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    except OSError as error:
        raise storage_error(out, error) from error
    if not resume:
        # A process that was killed right at its start is no run that could be resumed, and nothing worth keeping.
        present = [name for name in names if name != LOCK_NAME and not is_leftover(name)]
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
            f"{out} was begun with another configuration: {'; '.join(differences)}. Resume without these options, go "
            "on with the new ones by --allow-changes, or start a new run in another --out"
        )
    return differences


def saved_config(run: Path) -> Config:
    """The configuration a run was begun with, or last resumed with."""
    path = run / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{run} holds no run to resume ({CONFIG_NAME} is missing); start one without --resume")
    return load_config(file=path, environment={})


def config_values(config: Config) -> dict[str, str]:
    """Dotted key → value as TOML, of every key: a form that other versions can read and compare."""
    values: dict[str, str] = {}
    for section in Config.model_fields:
        value = getattr(config, section)
        if isinstance(value, Section):
            values |= {f"{section}.{key}": toml_value(getattr(value, key)) for key in type(value).model_fields}
        else:
            values[section] = toml_value(value)
    return values


def config_differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """`section.key was A, is now B` for each key that decides the weights and differs; see `config_values`."""
    keys = [key for key in [*now, *(key for key in before if key not in now)] if key not in FREE_KEYS]
    return [
        f"{key} was {before.get(key, 'unknown')}, is now {now.get(key, 'unknown')}"
        for key in keys
        if before.get(key) != now.get(key)
    ]


def refuse_another_network(where: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse weights of a network of another kind, which no option allows.

    Args:
        where: what holds the weights.
        before: their configuration, as `config_values` gives it.
        now: the configuration that is to go on.

    Raises:
        DataError: naming both.
    """
    fixed = [{key: value for key, value in values.items() if key in FIXED_KEYS} for values in (before, now)]
    if differences := config_differences(*fixed):
        raise DataError(
            f"the weights in {where} are those of another network: {'; '.join(sorted(differences))}; they cannot go on "
            "in this one. Resume without these options, or start a new run in another --out"
        )
