"""A process that loads malformed files, one after another, through every public entry point.

It reads a JSON object from stdin, `{"files": [[way, path], …], "canary": path, "folder": path, "model": path,
"photo": path}`, and prints one JSON object per file and entry point: how the call ended, its message, seconds, and the
peak growth of memory in MiB. Each call has 30 seconds.
"""

import contextlib
import io
import json
import logging
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastnst.cli import main as cli
from fastnst.config import load_config
from fastnst.errors import UserError
from fastnst.images import read_image
from fastnst.models.pretrained import load_lengstrom_npz
from fastnst.models.style_model import load_style_model
from fastnst.models.weights import load_vgg19
from fastnst.training.run_dir.checkpoint import latest_checkpoint

SECONDS = 30
Way = tuple[str, Callable[[], object]]


class TookTooLong(BaseException):
    """Not an Exception, so that no `except Exception` swallows it."""


def ways_in(way: str, path: Path, given: dict[str, Any]) -> Iterator[Way]:
    """Yield name and call of each public entry point for one file."""
    folder, photo, model = Path(given["folder"]), given["photo"], given["model"]
    out = folder / "out"
    if way == "vgg":
        yield "load_vgg19", lambda: load_vgg19(str(path), last_layer="relu1_1")
        options = ("--layer", "relu1_1", "--maps", 0, "--size", 32, "--device", "cpu", "--out", out)
        yield "visualize", lambda: command("visualize", "deconvnet", photo, "--vgg", path, *options)
    elif way == "style":
        yield "load_style_model", lambda: load_style_model(path)
        yield "stylize", lambda: command("stylize", path, photo, "--out", out / "stylized.png", "--device", "cpu")
    elif way == "npz":
        yield "load_lengstrom_npz", lambda: load_lengstrom_npz(path)
    elif way == "config":
        yield "load_config", lambda: load_config(file=path, environment={})
        yield "train", lambda: command("train", "--config", path, "--dry-run")
        run = folder / f"run_of_{path.name}"
        run.mkdir()
        (run / "config.toml").symlink_to(path)
        yield "train --resume", lambda: command("train", "--resume", "--out", run, "--dry-run")
    elif way == "checkpoint":
        yield "latest_checkpoint", lambda: newest(path)
        yield "visualize", lambda: command("visualize", "transform", path, photo, "--checkpoint", 1, "--out", out)
    elif way in ("image", "large"):
        yield "read_image", lambda: read_image(path)
        if way == "image" and path.stat().st_size < 1 << 20:
            yield "stylize", lambda: command("stylize", model, path, "--out", out / "stylized.png", "--device", "cpu")
            only = folder / "only"
            shutil.rmtree(only, ignore_errors=True)
            only.mkdir()
            (only / path.with_suffix(".png").name).symlink_to(path)
            yield "data check", lambda: command("data", "check", only)


def newest(run: Path) -> None:
    """Raise the messages about skipped checkpoints as an error."""
    messages = io.StringIO()
    handler = logging.StreamHandler(messages)
    logging.getLogger("fastnst").addHandler(handler)
    try:
        if latest_checkpoint(run) is None:
            raise UserError(messages.getvalue())
    finally:
        logging.getLogger("fastnst").removeHandler(handler)


def command(*arguments: object) -> None:
    """Run a command; raise its message as UserError on exit codes 2 and 3, RuntimeError on other failures."""
    sys.argv = ["fastnst", *map(str, arguments)]
    stderr = io.StringIO()
    try:
        # Commands print paths as bytes.
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())), contextlib.redirect_stderr(stderr):
            cli.main()
    except SystemExit as ended:
        if ended.code in (2, 3):
            raise UserError(stderr.getvalue()) from None
        if ended.code:
            raise RuntimeError(f"exit code {ended.code}: {stderr.getvalue()}") from None


def memory(key: str) -> int:
    """Return an entry of /proc/self/status in MiB."""
    found = re.search(key + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) // 1024


def outcome(call: Callable[[], object]) -> dict[str, Any]:
    """Make one call; return how it ended, and its time and memory."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, begin = memory("VmRSS"), time.monotonic()
    signal.alarm(SECONDS)
    try:
        call()
        ended, message = "read", ""
    except UserError as error:
        ended, message = "refused", str(error)
    except TookTooLong:
        ended, message = "took too long", "".join(traceback.format_exc()[-500:])
    except BaseException:
        ended, message = "raised", traceback.format_exc()[-1500:]
    finally:
        signal.alarm(0)
    grown, seconds = memory("VmHWM") - before, time.monotonic() - begin
    return {"ended": ended, "message": message, "mib": grown, "seconds": round(seconds, 1)}


def too_long(*_: object) -> None:
    """Interrupt a call (SIGALRM)."""
    raise TookTooLong


def main() -> None:
    """Read the request from stdin and print the results."""
    warnings.simplefilter("error")  # as under pytest
    given = json.load(sys.stdin)
    signal.signal(signal.SIGALRM, too_long)
    # A bomb must end this process, not the machine.
    limit = (memory("VmSize") + 8192) << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps({"ended": "warmed up", **outcome(lambda: command("stylize", "/nowhere", "x", "--out", "y"))}))
    for way, path in given["files"]:
        for name, call in ways_in(way, Path(path), given):
            print(json.dumps({"way": way, "file": Path(path).name, "through": name}), file=sys.stderr, flush=True)
            result = outcome(call) | {"canary": Path(given["canary"]).exists()}
            print(json.dumps({"way": way, "file": Path(path).name, "through": name} | result), flush=True)


if __name__ == "__main__":
    main()
