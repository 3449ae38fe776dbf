"""What a run directory holds, when one may be used, and what must be equal to go on with one."""

from collections.abc import Mapping
from pathlib import Path

from fastnst.config import Config, Section, VisualizeConfig, load_config
from fastnst.errors import DataError, UserError
from fastnst.storage import LOCK_NAME, storage_error

CONFIG_NAME = "config.toml"
REJECTED_NAME = "rejected.jsonl"

# Keys that change how a run is fed, watched or how long it is, never the weights at a given step.
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
        "data.workers",
        "data.prefetch",
        *(f"visualize.{key}" for key in VisualizeConfig.model_fields),
    }
)


def prepare_run(out: Path, config: Config, *, resume: bool) -> None:
    """Check that `out` may hold this run; makes nothing.

    Raises:
        UserError: a new run into a directory that holds something, or a resumed one that differs.
        DataError: `out` cannot be looked into.
    """
    try:
        present = sorted(entry.name for entry in out.iterdir() if entry.name != LOCK_NAME) if out.exists() else []
    except OSError as error:
        raise storage_error(out, error) from error
    if not resume:
        if CONFIG_NAME in present:
            raise UserError(f"{out} holds another run; go on with it by --resume, or choose another --out")
        if present:
            raise UserError(f"{out} is not empty (it holds {present[0]!r}); choose another --out")
        return
    differences = config_differences(saved_config(out), config)
    if differences:
        raise UserError(
            f"{out} was begun with another configuration: {'; '.join(differences)}. Resume without these options, or "
            "start a new run in another --out"
        )


def saved_config(run: Path) -> Config:
    """The configuration a run was begun with."""
    path = run / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{run} holds no run to resume ({CONFIG_NAME} is missing); start one without --resume")
    return load_config(file=path, environment={})


def config_differences(before: Config, now: Config) -> list[str]:
    """`section.key was A, is now B` for each key that decides the weights and differs."""
    differences = []
    for section in Config.model_fields:
        old, new = getattr(before, section), getattr(now, section)
        if not isinstance(old, Section):
            pairs = [(section, old, new)]
        else:
            pairs = [(f"{section}.{key}", getattr(old, key), getattr(new, key)) for key in type(old).model_fields]
        differences += [f"{key} was {a}, is now {b}" for key, a, b in pairs if a != b and key not in FREE_KEYS]
    return differences


def check_same_inputs(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on with other pictures than the checkpoint's.

    Raises:
        DataError: naming what changed.
    """
    named = {"data": "the pictures in the data folder", "style": "the style picture"}
    for key, what in named.items():
        if before.get(key) != now[key]:
            raise DataError(
                f"{what} changed since the checkpoint was written (SHA-256 {str(before.get(key))[:12]}… then, "
                f"{now[key][:12]}… now); restore them, or start a new run in another --out"
            )
