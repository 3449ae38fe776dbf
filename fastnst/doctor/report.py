"""From facts to lines that can be pasted anywhere: aligned, plain, without the names of user and machine."""

import contextlib
import getpass
import re
import socket
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastnst.doctor import installation
from fastnst.doctor.children import Facts, ProbeError, in_words
from fastnst.doctor.verdict import Check, Status, Verdict

_PAGE = 110
_INDENT = 21


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    name: str
    status: Status
    found: str
    fix: str | None
    exit_code: int
    """Of the command, if this is the first row that failed."""


@dataclass(frozen=True)
class Report:
    rows: Sequence[Row]
    versions: dict[str, str | None]

    @property
    def exit_code(self) -> int:
        """0 if nothing failed, else that of the first row that did: 1 installation, 3 storage, 5 device or memory."""
        return next((row.exit_code for row in self.rows if row.status == "FAIL"), 0)

    def as_json(self) -> dict[str, Any]:
        keys = ("name", "status", "found", "fix")
        checks = [{key: getattr(row, key) for key in keys} for row in self.rows]
        return {"ok": self.exit_code == 0, "checks": checks, "versions": self.versions}

    def lines(self) -> Iterator[tuple[Status | None, str]]:
        """The report as text; a line that begins with a status comes with it."""
        for row in self.rows:
            first, *rest = _wrapped(row.found)
            yield row.status, f"{row.status}  {row.name:<{_INDENT - 6}}{first}"
            fix = f"fix: {row.fix}".splitlines() if row.fix else []
            for line in rest + [part for text in fix for part in _wrapped(text)]:
                yield None, " " * _INDENT + line
        counts = {status: sum(row.status == status for row in self.rows) for status in ("PASS", "WARN", "FAIL")}
        yield None, ""
        yield None, f"{counts['PASS']} passed, {counts['WARN']} warned, {counts['FAIL']} failed"


def report(facts: Facts, checks: Sequence[Check]) -> Report:
    """What the facts come to, without the names of the user and of the machine."""
    anonymous = _Anonymous()
    rows = []
    for check in checks:
        for verdict in _verdicts(check, facts):
            fix = None if verdict.fix is None else anonymous(verdict.fix)
            rows.append(Row(verdict.name or check.name, verdict.status, anonymous(verdict.found), fix, check.exit_code))
    return Report(rows, installation.versions(facts))


def _verdicts(check: Check, facts: Facts) -> Sequence[Verdict]:
    try:
        verdicts = check.judge(facts)
    except ProbeError as error:
        return [Verdict("FAIL", str(error), check.if_not_known)]
    except Exception as error:
        # A mistake in a check is no reason to withhold the others.
        return [Verdict("FAIL", f"the check itself failed: {in_words(error)}", check.if_not_known)]
    return [verdicts] if isinstance(verdicts, Verdict) else verdicts


def _wrapped(text: str) -> list[str]:
    """Lines that fit the page. A command stays whole, so that it can be pasted into a shell."""
    if text.startswith(" "):
        return [text]
    return textwrap.wrap(text, _PAGE - _INDENT, break_long_words=False, break_on_hyphens=False) or [""]


class _Anonymous:
    """Replaces the home folder by `~`, the user's name in other paths by `$USER`, and the machine's name by `HOST`."""

    def __init__(self) -> None:
        self._rules: list[tuple[re.Pattern[str], str]] = []
        with contextlib.suppress(RuntimeError, OSError):
            for home in {str(Path.home()), str(Path.home().resolve())} - {"/"}:
                self._replace(rf"(?<![\w/]){re.escape(home)}(?![\w.-])", "~")
        with contextlib.suppress(KeyError, OSError):
            self._replace(rf"(?<=/){re.escape(getpass.getuser())}(?![\w.-])", "$USER")
        if (host := socket.gethostname()) not in ("", "localhost"):
            self._replace(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", "HOST")

    def __call__(self, text: str) -> str:
        for pattern, replacement in self._rules:
            text = pattern.sub(replacement, text)
        return text

    def _replace(self, pattern: str, replacement: str) -> None:
        self._rules.append((re.compile(pattern), replacement))
