"""Operations of a training step with their FLOPs and bytes; `cost_model` defines them."""

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
    """One pass of the training step."""

    part: str
    layer: str
    kind: str
    flops: int
    minimum_bytes: int
    moved_bytes: int

    def seconds(self, flops_per_s: float, bytes_per_s: float, *, planned: bool = False) -> float:
        """Lower bound of the time at these rates; `planned`: with the bytes that we move."""
        moved = self.moved_bytes if planned else self.minimum_bytes
        return max(self.flops / flops_per_s, moved / bytes_per_s)


@dataclass
class OperationList:
    """The passes in order of execution, each with the tensors that it reads first in its phase."""

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
        """Append a pass.

        Args:
            part: one of `PARTS`.
            layer: its layer.
            kind: its operation.
            reads: bytes by tensor.
            writes: bytes by tensor.
            flops: of its matrix products.
            vectors: bytes of statistics and per-channel vectors, read and written.
            moved: bytes of our launches; None: everything once.
            through: a tensor that the pass only rewrites. The minimum fuses the pass into the neighbour that writes or
                reads this tensor and counts the other reads only.
        """
        phase = _PHASES.get(part, "forward")
        unread = {name: size for name, size in reads.items() if (phase, name) not in self._read}
        self._read |= {(phase, name) for name in reads}
        minimum = sum(unread.values()) + sum(writes.values()) + vectors
        if through is not None:
            minimum = sum(size for name, size in unread.items() if name != through)
        if moved is None:
            moved = sum(reads.values()) + sum(writes.values()) + vectors
        self.operations.append(Operation(part, layer, kind, flops, minimum, moved))
