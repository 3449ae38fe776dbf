"""Open a safetensors file: mapped into memory, or read where the file system maps no files."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import safetensors.torch
from safetensors import safe_open
from torch import Tensor


class SafetensorsFile(Protocol):
    """What `safetensors.safe_open` returns, as far as it is used here."""

    def metadata(self) -> dict[str, str] | None:
        """Return the strings of the header."""

    def keys(self) -> list[str]:
        """List the tensors."""

    def get_tensor(self, name: str) -> Tensor:
        """Return a tensor, on the CPU."""


class _InMemory:
    def __init__(self, data: bytes) -> None:
        self._tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        self._metadata: dict[str, str] | None = json.loads(data[8 : 8 + length]).get("__metadata__")

    def metadata(self) -> dict[str, str] | None:
        return self._metadata

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[SafetensorsFile]:
    """Open a file whose start has been checked (`file_checks.check_safetensors_file`).

    Raises:
        OSError: it cannot be read.
        SafetensorError: it is damaged.
    """
    with contextlib.ExitStack() as stack:
        try:
            file: SafetensorsFile = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except OSError:
            # It lacks an error number; reading tells whether only the mapping is refused.
            file = _InMemory(path.read_bytes())
        yield file
