"""What a check comes to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fastnst.doctor.children import Facts

Status = Literal["PASS", "WARN", "FAIL"]

# Exit codes: what fails here would end another command with the same one. A broken installation ends any with 1.
INSTALLATION, STORAGE, DEVICE = 1, 3, 5


@dataclass(frozen=True)
class Verdict:
    """PASS: as it should be. WARN: `fastnst` works, but slower or with less. FAIL: something does not work."""

    status: Status
    found: str
    fix: str | None = None
    """What to do, for all but PASS. Lines that begin with a space are commands."""
    name: str | None = None
    """Where a check has several results, which one this is."""

    def __post_init__(self) -> None:
        assert (self.fix is None) == (self.status == "PASS"), self


@dataclass(frozen=True)
class Check:
    """A line, or a few, of the report.

    `judge` takes the facts and touches nothing else. It need not handle the failure of a probe.
    """

    name: str
    judge: Callable[[Facts], Verdict | Sequence[Verdict]]
    exit_code: int
    if_not_known: str
    """The fix where the check itself could not be carried out."""


def passed(found: str) -> Verdict:
    return Verdict("PASS", found)


def warned(found: str, fix: str) -> Verdict:
    return Verdict("WARN", found, fix)


def failed(found: str, fix: str) -> Verdict:
    return Verdict("FAIL", found, fix)


def gib(count: float) -> str:
    """Bytes as GiB: one unit for all, so that lines compare."""
    return f"{count / 2**30:.1f} GiB"
