"""Passes of a step with their FLOPs and bytes, and which reads of a tensor count in the minimum: `step_model` says."""

from __future__ import annotations

from dataclasses import dataclass, field

IN, TRANSFORM, VGG, CONTENT, LOSS, VGG_BACK, TRANSFORM_BACK, UPDATE = PARTS = (
    "images",
    "transform net forward",
    "VGG19 forward",
    "VGG19 content",
    "losses",
    "VGG19 backward",
    "transform net backward",
    "update",
)
_PHASES = {CONTENT: "content", VGG_BACK: "backward", TRANSFORM_BACK: "backward", UPDATE: "backward"}


@dataclass(frozen=True)
class Operation:
    """One pass of the step."""

    part: str
    layer: str
    kind: str
    flops: int
    minimum_bytes: int
    moved_bytes: int

    def seconds(self, flops_per_s: float, bytes_per_s: float, *, planned: bool = False) -> float:
        """The least time on a GPU of these rates; `planned`: with the bytes that we move."""
        moved = self.moved_bytes if planned else self.minimum_bytes
        return max(self.flops / flops_per_s, moved / bytes_per_s)


@dataclass
class Ledger:
    """The passes in the order in which they run, and what each of them has to read anew."""

    operations: list[Operation] = field(default_factory=list)
    _read: set[tuple[str, str]] = field(default_factory=set)

    def add(
        self,
        part: str,
        layer: str,
        kind: str,
        *,
        reads: dict[str, int],
        writes: dict[str, int],
        flops: int = 0,
        vectors: int = 0,
        moved: int | None = None,
        through: str | None = None,
    ) -> None:
        """Note a pass.

        Args:
            part: one of `PARTS`.
            layer: what it belongs to.
            kind: what it is.
            reads: tensors and their bytes.
            writes: likewise.
            flops: of its matrix products.
            vectors: bytes of statistics and per-channel vectors, read and written.
            moved: what our launches move; None: everything once.
            through: the minimum does without this pass: who wrote this tensor, or who reads the result, does its work
                and reads what else there is to read. The result then is that tensor by another name.
        """
        record_span = _PHASES.get(part, "forward")
        unread = {name: size for name, size in reads.items() if (record_span, name) not in self._read}
        self._read |= {(record_span, name) for name in reads}
        minimum = sum(unread.values()) + sum(writes.values()) + vectors
        if through is not None:
            minimum = sum(size for name, size in unread.items() if name != through)
        if moved is None:
            moved = sum(reads.values()) + sum(writes.values()) + vectors
        self.operations.append(Operation(part, layer, kind, flops, minimum, moved))
