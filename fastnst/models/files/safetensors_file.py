"""Open a safetensors file: mapped into memory, or read where the file system maps no files."""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from safetensors import deserialize, safe_open

if TYPE_CHECKING:
    from torch import Tensor


class SafetensorsFile(Protocol):
    """What `safetensors.safe_open` returns, as far as it is used here."""

    def metadata(self) -> dict[str, str] | None:
        """Return the strings of the header."""

    def keys(self) -> list[str]:
        """List the tensors."""

    def get_tensor(self, name: str) -> "Tensor":
        """Return a tensor, on the CPU."""


class _InMemory:
    def __init__(self, data: bytes) -> None:
        self._data, self._names = data, [name for name, _ in deserialize(data)]  # type: ignore[no-untyped-call]

    def metadata(self) -> dict[str, str] | None:
        length = int.from_bytes(self._data[:8], "little")
        found: dict[str, str] | None = json.loads(self._data[8 : 8 + length]).get("__metadata__")
        return found

    def keys(self) -> list[str]:
        return self._names

    def get_tensor(self, name: str) -> "Tensor":
        return self._tensors[name]

    @functools.cached_property
    def _tensors(self) -> "dict[str, Tensor]":
        import safetensors.torch

        return safetensors.torch.load(self._data)


@contextlib.contextmanager
def open_safetensors(path: Path, framework: Literal["pt", "np"] = "pt") -> Iterator[SafetensorsFile]:
    """Open a file whose start has been checked (`file_checks.check_safetensors_file`).

    For its names and metadata alone, `np` does without torch.

    Raises:
        OSError: it cannot be read.
        SafetensorError: it is damaged.
    """
    with contextlib.ExitStack() as stack:
        try:
            file: SafetensorsFile = stack.enter_context(safe_open(path, framework=framework, device="cpu"))
        except OSError:
            # It lacks an error number; reading tells whether only the mapping is refused.
            file = _InMemory(path.read_bytes())
        yield file
