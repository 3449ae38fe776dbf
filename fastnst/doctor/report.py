"""Format results as aligned plain text without the names of the user and the machine."""

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
from fastnst.doctor.verdict import Check, Status, Verdict
from fastnst.doctor.workers import ProbeError, Results, format_error

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
    """The command's exit code if this is the first failed row."""


@dataclass(frozen=True)
class Report:
    rows: Sequence[Row]
    versions: dict[str, str | None]

    @property
    def exit_code(self) -> int:
        """0, or the code of the first failed row: 1 installation, 3 storage, 5 device or memory."""
        return next((row.exit_code for row in self.rows if row.status == "FAIL"), 0)

    def as_json(self) -> dict[str, Any]:
        keys = ("name", "status", "found", "fix")
        checks = [{key: getattr(row, key) for key in keys} for row in self.rows]
        return {"ok": self.exit_code == 0, "checks": checks, "versions": self.versions}

    def lines(self) -> Iterator[tuple[Status | None, str]]:
        """Yield (status, line); status is None for lines that do not begin with one."""
        for row in self.rows:
            first, *rest = _wrapped(row.found)
            yield row.status, f"{row.status}  {row.name:<{_INDENT - 6}}{first}"
            fix = f"fix: {row.fix}".splitlines() if row.fix else []
            for line in rest + [part for text in fix for part in _wrapped(text)]:
                yield None, " " * _INDENT + line
        counts = {status: sum(row.status == status for row in self.rows) for status in ("PASS", "WARN", "FAIL")}
        yield None, ""
        yield None, f"{counts['PASS']} passed, {counts['WARN']} warned, {counts['FAIL']} failed"


def report(results: Results, checks: Sequence[Check]) -> Report:
    """Evaluate the checks; the names of the user and the machine are replaced."""
    anonymous = _Anonymous()
    rows = []
    for check in checks:
        for verdict in _verdicts(check, results):
            fix = None if verdict.fix is None else anonymous(verdict.fix)
            rows.append(Row(verdict.name or check.name, verdict.status, anonymous(verdict.found), fix, check.exit_code))
    return Report(rows, installation.versions(results))


def _verdicts(check: Check, results: Results) -> Sequence[Verdict]:
    try:
        verdicts = check.function(results)
    except ProbeError as error:
        return [Verdict("FAIL", str(error), check.fix_if_unknown)]
    except Exception as error:
        # A bug in one check must not hide the others.
        return [Verdict("FAIL", f"the check itself failed: {format_error(error)}", check.fix_if_unknown)]
    return [verdicts] if isinstance(verdicts, Verdict) else verdicts


def _wrapped(text: str) -> list[str]:
    """Wrap text to the page. A command stays on one line, to be pasted into a shell."""
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
