"""Parse and write configuration text: TOML files, environment variables and `--set` assignments."""

import codecs
import difflib
import functools
import logging
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fastnst.errors import UserError
from fastnst.storage import read_regular_file

log = logging.getLogger(__name__)

RENAMED_KEYS = {"style.picture": "style.image", "visualize.pictures": "visualize.images"}
"""Old name → name; both are read, the old one with a warning."""
RETIRED_KEYS = {"visualize.max_percent": "projections are logged every visualize.every steps, however long they take"}
"""Key that no longer does anything → what holds now; it is read with a warning."""
ENVIRONMENT_PREFIX = "FASTNST_"
MAX_FILE_BYTES = 1 << 20
_MAX_DOTS = 500
_STRING = re.compile(r"""\"(?:[^"\\]|\\.)*\"|'[^']*'""")
_BACKSLASHES = re.compile(r"""^[^#\n]*?=\s*\[?\s*"?([^"'\n]*\\[^"'\n]*)""", re.MULTILINE)
_WINDOWS_PATH = re.compile(r"""^[^#\n]*"[A-Za-z]:\\[^\\]""", re.MULTILINE)
UNSET = "unset"  # TOML has no null: this word removes the value that a preset or file sets


def read_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file of at most 1 MiB, in UTF-8 (with or without a byte order mark), or UTF-16 with one.

    Raises:
        UserError: it cannot be read, is too large, in another encoding, or not TOML.
    """
    text = ""
    try:
        text = _decode(read_regular_file(file, MAX_FILE_BYTES))
        # "C:\temp" would be read as a tab between C: and emp.
        if _WINDOWS_PATH.search(text):
            raise ValueError("in double quotes a backslash has a meaning of its own")
        return _parse_toml(text)
    except OSError as error:
        raise UserError(
            f"cannot read the configuration {file}: {error.strerror}; give an existing TOML file"
        ) from error
    except RecursionError as error:
        raise UserError(f"{file} nests its values too deep; no key needs more than a list") from error
    except UnicodeError as error:
        raise UserError(f"{file} is not TOML: it is not UTF-8 ({error}); save it as UTF-8 in your editor") from error
    except ValueError as error:  # not TOML, or a number with thousands of digits
        advice = "write sections like [train] with lines like steps = 100"
        if (found := _BACKSLASHES.search(text)) is not None:
            advice = f"write a path with backslashes in single quotes: '{found[1].strip()}'"
        raise UserError(f"{file} is not TOML: {str(error)[:200]}; {advice}") from error


def environment_texts(environment: Mapping[str, str]) -> dict[str, str]:
    """Return dotted key → text of the variables `FASTNST_SECTION__KEY` and `FASTNST_PRESET`, ignoring others."""
    return {
        name.lower().replace("__", ".", 1): text
        for variable, text in environment.items()
        if (name := variable.removeprefix(ENVIRONMENT_PREFIX)) != variable and ("__" in name or name == "PRESET")
    }


def current_keys(values: Mapping[str, str]) -> dict[str, str]:
    """Return dotted key → value with today's keys, of values that an older version may have saved."""
    return {RENAMED_KEYS.get(key, key): value for key, value in values.items() if key not in RETIRED_KEYS}


def update_old_keys(values: dict[str, Any], source: str, *, warn: bool = True) -> None:
    """Rename the old keys of a source and remove the retired ones; `warn` logs one warning for each.

    Raises:
        UserError: a key is set under both names.
    """
    for old in (*RETIRED_KEYS, *RENAMED_KEYS):
        section, _, old_key = old.partition(".")
        keys = values.get(section)
        if not isinstance(keys, dict) or old_key not in keys:
            continue
        value = keys.pop(old_key)
        if old in RETIRED_KEYS:
            if warn:
                _warn_once(f"{source}: {old} no longer does anything: {RETIRED_KEYS[old]}")
            continue
        new = RENAMED_KEYS[old]
        if new.partition(".")[2] in keys:
            raise UserError(f"{source}: {old} is the old name of {new}, and both are set; remove {old}")
        keys[new.partition(".")[2]] = value
        if warn:
            _warn_once(f"{source}: {old} is now named {new}; the old name still works")


@functools.cache
def _warn_once(message: str) -> None:
    """Log a warning; a run reads some of its sources several times."""
    log.warning("%s", message)


def split_assignment(assignment: str) -> tuple[str, str]:
    """Split `section.key=value` into key and text.

    Raises:
        UserError: the key or the equals sign is missing.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set takes section.key=value, got {assignment!r}; for example --set train.steps=100")
    return key.strip(), text.strip()


def parse_value(text: str, annotation: Any) -> Any:
    """Parse a typed value: TOML, in which words need no quotes and lists no brackets.

    Args:
        text: as typed.
        annotation: type of the key; decides whether `2024` is a number or the name of a folder.
    """
    value = _parse_toml_value(text)
    if get_origin(annotation) is tuple and not isinstance(value, list):
        items = [item.strip() for item in text.strip("[]").split(",")]
        return [_parse_toml_value(item) for item in items if item]
    takes_text = get_origin(annotation) is Literal or {annotation, *get_args(annotation)} & {str, Path}
    if takes_text and get_origin(annotation) is not tuple and not isinstance(value, str):
        return text
    return value


def toml_value(value: object) -> str:
    """Format `value` as TOML; None becomes `"unset"`.

    Raises:
        UserError: a file name is not UTF-8, which TOML requires.
    """
    match value:
        case None:
            return f'"{UNSET}"'
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return repr(value)
        case tuple() | list():
            return "[" + ", ".join(toml_value(item) for item in value) + "]"
        case Path() if str(value) == UNSET:
            return f'"./{UNSET}"'  # a file of this name
        case _:
            return _toml_string(str(value))


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean 'X'?` with the known name most similar to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix + near[0]!r}?" if near else ""


def shown(value: object) -> str:
    """Format a value of any size for a message, in at most 200 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"something too large to be shown ({type(value).__name__})"
    return text if len(text) <= 200 else f"{text[:199]}…"


def _decode(data: bytes) -> str:
    """Decode a text file by its byte order mark, if it has one; Windows editors and shells write such files.

    Raises:
        UnicodeError: it is in another encoding; the message says which line shows it.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        if len(data) == len(codecs.BOM_UTF16_LE):
            raise UnicodeError("nothing follows its byte order mark")
        return data.decode("utf-16")
    if b"\0" in data[:4]:
        raise UnicodeError("it looks like UTF-16 or UTF-32")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UnicodeError(
            f"byte 0x{data[error.start]:02x} in line {line}: perhaps Windows-1252 (ANSI) or Latin-1"
        ) from error


def _parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML; raises ValueError or RecursionError."""
    # The parser's time is quadratic in the number of parts of a dotted key, which stands on one line.
    if any(_dots(line) > _MAX_DOTS for line in text.splitlines()):
        raise ValueError(f"a line has more than {_MAX_DOTS} dots outside strings")
    return tomllib.loads(text)


def _dots(line: str) -> int:
    """Count the dots of a line outside strings."""
    # With a multi-line string's delimiter, inside and outside depend on other lines: count all dots.
    if line.count(".") > _MAX_DOTS and '"""' not in line and "'''" not in line:
        line = _STRING.sub("", line)
    return line.count(".")


def _parse_toml_value(text: str) -> Any:
    try:
        match _parse_toml(f"value = {text}"):
            case {"value": value, **others} if not others:  # a line break in `text` could add a key
                return value
    except (ValueError, RecursionError):  # not TOML, or a number with thousands of digits, or thousands of brackets
        pass
    return text


def _toml_string(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the name {text!r} is not UTF-8, and a configuration file must be; rename it") from error
    escaped = "".join(
        {"\\": "\\\\", '"': '\\"'}.get(char, char if char.isprintable() else f"\\U{ord(char):08x}") for char in text
    )
    return f'"{escaped}"'
