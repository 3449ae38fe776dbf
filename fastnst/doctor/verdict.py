"""Verdicts and checks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fastnst.doctor.workers import Results

Status = Literal["PASS", "WARN", "FAIL"]

# Exit codes: the same that other commands end with for such a fault; a broken installation ends any with 1.
INSTALLATION, STORAGE, DEVICE = 1, 3, 5


@dataclass(frozen=True)
class Verdict:
    """PASS: as it should be. WARN: `fastnst` works, but slower or with less. FAIL: something does not work."""

    status: Status
    found: str
    fix: str | None = None
    """What to do, for WARN and FAIL. Lines that begin with a space are commands."""
    name: str | None = None
    """Replaces the check's name where a check has several verdicts."""

    def __post_init__(self) -> None:
        assert (self.fix is None) == (self.status == "PASS"), self


@dataclass(frozen=True)
class Check:
    """One or a few lines of the report, decided by a pure function of the probes' results."""

    name: str
    function: Callable[[Results], Verdict | Sequence[Verdict]]
    exit_code: int
    fix_if_unknown: str
    """The fix if the check's probe, or the check itself, raised."""


def passed(found: str) -> Verdict:
    return Verdict("PASS", found)


def warned(found: str, fix: str) -> Verdict:
    return Verdict("WARN", found, fix)


def failed(found: str, fix: str) -> Verdict:
    return Verdict("FAIL", found, fix)


def gib(count: float) -> str:
    """Format bytes as GiB: one unit everywhere, so that lines compare."""
    return f"{count / 2**30:.1f} GiB"
