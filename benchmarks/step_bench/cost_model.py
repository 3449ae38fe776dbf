"""Cost model of a training step: a list of operations with their FLOPs and bytes; no GPU is needed.

FLOPs are those of matrix products (convolutions, Gram matrices), a multiply-add counting two, in their plain form; the
arithmetic between them takes far less time than its bytes.

Bytes that we move: the reads and writes of each operation of the planned step, once per operand: convolutions with bias
and ReLU in one call; the fused kernels as they are launched (`fastnst_kernels.inspection` records the operands of each
launch for an H100, without one), and the remaining passes between them: ReLU masks of layers without a loss, sums of
residual gradients, casts of weights and weight gradients, the crop after transposed convolutions.

Minimum bytes: the bytes that no implementation of the passes avoids. The passes are convolution, norm (statistics need
the whole image before the first result), pooling, Gram matrix, content term, the boundaries between images and
networks, Adam; pointwise work is fused into them. Each tensor between two passes is written once and, in each phase of
the step (forward, content, backward), read once for all passes; so is each weight. Nothing stays on chip between
passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastnst.config import Config
from fastnst.device import DTYPES
from fastnst_kernels.inspection import cost
from step_bench.kernel_traffic import launched_bytes
from step_bench.layer_shapes import Conv, VggLayer, transform_convs, vgg_layers
from step_bench.operations import (
    CONTENT,
    IN,
    LOSS,
    TRANSFORM,
    TRANSFORM_BACK,
    UPDATE,
    VGG,
    VGG_BACK,
    Operation,
    OperationList,
)


def training_step(config: Config, precision: str) -> list[Operation]:
    """List all passes of a step in order of execution.

    Args:
        config: architecture, norm, loss layers, image and batch size.
        precision: `bf16`, `fp16` or `fp32`, of activations and of the weights in products.
    """
    return _Step(config, DTYPES[precision]).run()


class _Step:
    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        self.config, self.dtype, self.item = config, dtype, dtype.itemsize
        self.batch = config.train.batch_size
        self.ops = OperationList()
        self.first, self.convs = transform_convs(config)
        loss, side = config.loss, config.data.image_size
        self.side = side
        # The norm after a block's second convolution adds the block's input, which is stored with a border.
        pairs = zip(self.convs, self.convs[1:], strict=False)
        self.block_side = {second.name: first.side for first, second in pairs if second.residual}
        self.loss_layers = (*loss.content_layers, *loss.style_layers)
        self.vgg = vgg_layers(self.loss_layers, side)
        self.content = vgg_layers(loss.content_layers, side)

    def run(self) -> list[Operation]:
        self._inputs()
        self._transform_forward()
        self._vgg_forward(VGG, self.vgg, "ŷ", for_backward=True)
        self._vgg_forward(CONTENT, self.content, "x", for_backward=False)
        self._losses()
        self._vgg_backward()
        self._transform_backward()
        self._update()
        return self.ops.operations

    def _bytes(self, channels: int, side: int) -> int:
        return self.batch * channels * side * side * self.item

    def _shape(self, channels: int, side: int) -> tuple[int, int, int, int]:
        return self.batch, channels, side, side

    def _inputs(self) -> None:
        if self.item < 4:
            convs = self.convs
            count = sum(conv.inputs * conv.outputs * conv.kernel**2 for conv in convs)
            self.ops.add(
                IN, "weights", "cast", reads={"weights fp32": 4 * count}, writes={"weights": self.item * count}
            )
        self._uint8_input("conv1", "in", self.first)
        if self.content:
            self._uint8_input("conv1_1", "x", self.side)

    def _uint8_input(self, first: str, who: str, side: int) -> None:
        """From uint8 to the input of a network's first convolution, padded to `side` pixels."""
        border = (side - self.side) // 2
        self.ops.add(
            IN,
            first,
            "from bytes",
            reads={"batch": self.batch * 3 * self.side**2},
            writes={f"{who} to {first}": self._bytes(3, side)},
            moved=launched_bytes("uint8_to_input", self._shape(3, self.side), self.dtype, padding=border),
        )

    def _transform_forward(self) -> None:
        source = "in to conv1"
        block = source
        for conv in self.convs:
            if conv.name.endswith("conv1") and conv.name != "conv1":
                block = source
            made = f"{conv.name} conv"
            self.ops.add(
                TRANSFORM,
                conv.name,
                "convolution",
                flops=self.batch * conv.flops,
                reads={source: self._bytes(conv.inputs, conv.side), **self._weight(conv)},
                writes={made: self._bytes(conv.outputs, conv.reach)},
            )
            if conv.transposed:
                self._crop(TRANSFORM, conv, made, f"{conv.name} cut")
                made = f"{conv.name} cut"
            source = made
            if conv.has_norm:
                source = f"{conv.name} out"
                reads = {made: self._bytes(conv.outputs, conv.out)}
                if conv.residual:
                    reads[block] = self._bytes(conv.outputs, conv.out)
                self._norm(TRANSFORM, conv, reads, {source: self._bytes(conv.outputs, conv.laid_out)}, backward=False)
        self.pre_activation = source
        self.ops.add(
            TRANSFORM,
            "ŷ",
            "scale, normalise",
            reads={source: self._bytes(3, self.side)},
            writes={"ŷ to conv1_1": self._bytes(3, self.side)},
            moved=launched_bytes("output_to_vgg_input", self._shape(3, self.side), self.dtype),
        )

    def _weight(self, conv: Conv) -> dict[str, int]:
        return {f"{conv.name} weight": conv.inputs * conv.outputs * conv.kernel**2 * self.item}

    def _crop(self, part: str, conv: Conv, source: str, result: str) -> None:
        """Crop a transposed convolution's result by a copy, or, backwards, pad its gradient with zeros."""
        sizes = self._bytes(conv.outputs, conv.out), self._bytes(conv.outputs, conv.reach)
        read, written = sizes if part == TRANSFORM_BACK else (sizes[0], sizes[0])
        self.ops.add(part, conv.name, "cut", reads={source: read}, writes={result: written}, through=source)

    def _norm(self, part: str, conv: Conv, reads: dict[str, int], writes: dict[str, int], *, backward: bool) -> None:
        shape = self._shape(conv.outputs, conv.out)
        options: dict[str, Any] = {"residual": conv.residual, "relu": conv.relu}
        if conv.residual:
            options["residual_border"] = (self.block_side[conv.name] - conv.out) // 2
        kind = f"{self.config.model.norm}_norm"
        moved = launched_bytes(kind, shape, self.dtype, backward=backward, **options, **conv.layout._asdict())
        norm = getattr(cost, kind + ("_backward" if backward else ""))
        training = {"training": True} if self.config.model.norm == "batch" else {}
        # Statistics and per-channel vectors: the cost of the op without its images.
        least = norm(shape, self.dtype, **training).minimum_bytes
        vectors = least - (3 if backward else 2) * self._bytes(conv.outputs, conv.out)
        self.ops.add(part, conv.name, kind, reads=reads, writes=writes, vectors=vectors, moved=moved)

    def _vgg_forward(self, part: str, layers: Sequence[VggLayer], who: str, *, for_backward: bool) -> None:
        source = f"{who} to conv1_1"
        for layer in layers:
            result = f"{who} {layer.name}"
            size = self._bytes(layer.inputs, layer.side)
            if layer.is_pool:
                switches = self._bytes(layer.outputs, layer.side // 2) // self.item
                written = {result: switches * self.item} | ({f"{result} switches": switches} if for_backward else {})
                shape = self._shape(layer.inputs, layer.side)
                moved = launched_bytes("max_pool2d_switches", shape, self.dtype)
                self.ops.add(part, layer.name, "pool", reads={source: size}, writes=written, moved=moved)
            else:
                self.ops.add(
                    part,
                    layer.name,
                    "convolution",
                    flops=self.batch * layer.flops,
                    reads={source: size, f"{layer.name} weight": self._vgg_weight(layer)},
                    writes={result: self._bytes(layer.outputs, layer.side)},
                )
            source = result

    def _vgg_weight(self, layer: VggLayer) -> int:
        return 9 * layer.inputs * layer.outputs * self.item

    def _losses(self) -> None:
        loss = self.config.loss
        for layer in self.vgg:
            features, size = f"ŷ {layer.name}", self._bytes(layer.outputs, layer.side)
            shape = self._shape(layer.outputs, layer.side)
            if not layer.is_pool and layer.relu in loss.style_layers:
                grams = self.batch * layer.outputs**2
                self.ops.add(
                    LOSS,
                    layer.relu,
                    "style",
                    flops=2 * grams * layer.side**2,
                    reads={features: size, f"{layer.relu} target": 4 * layer.outputs**2},
                    writes={f"{layer.relu} matrix": grams * self.item},
                    moved=launched_bytes("style_loss", shape, self.dtype),
                )
            if {layer.name, layer.relu} & set(loss.content_layers):
                self.ops.add(LOSS, layer.relu, "content", reads={features: size, f"x {layer.name}": size}, writes={})

    def _vgg_backward(self) -> None:
        loss = self.config.loss
        incoming: str | None = None
        for index in reversed(range(len(self.vgg))):
            layer = self.vgg[index]
            features, size = f"ŷ {layer.name}", self._bytes(layer.outputs, layer.side)
            if layer.is_pool:
                assert incoming is not None
                pooled = self._bytes(layer.outputs, layer.side // 2)
                size = self._bytes(layer.inputs, layer.side)
                shape = self._shape(layer.inputs, layer.side)
                self.ops.add(
                    VGG_BACK,
                    layer.name,
                    "unpool",
                    reads={incoming: pooled, f"{features} switches": pooled // self.item},
                    writes={f"d {layer.name}": size},
                    moved=launched_bytes("max_unpool2d_switches", shape, self.dtype),
                )
                incoming = f"d {layer.name}"
                continue
            style, content = layer.relu in loss.style_layers, layer.relu in loss.content_layers
            reads = {features: size}
            if incoming is not None:
                reads[incoming] = size
            masked = f"d {layer.relu}"
            if style or content:
                if style:
                    reads[f"{layer.relu} matrix"] = self.batch * layer.outputs**2 * self.item
                if content:
                    reads[f"x {layer.name}"] = size
                shape = self._shape(layer.outputs, layer.side)
                moved = launched_bytes(
                    "loss_relu_backward", shape, self.dtype, incoming=incoming is not None, style=style, content=content
                )
                flops = 2 * self.batch * layer.outputs**2 * layer.side**2 if style else 0
                self.ops.add(VGG_BACK, layer.relu, "tap", flops=flops, reads=reads, writes={masked: size}, moved=moved)
            elif incoming is not None:
                self._mask(layer, reads, incoming, masked, size)
            incoming = f"d into {layer.name}"
            self.ops.add(
                VGG_BACK,
                layer.name,
                "input gradient",
                flops=self.batch * layer.flops,
                reads={masked: size, f"{layer.name} weight": self._vgg_weight(layer)},
                writes={incoming: self._bytes(layer.inputs, layer.side)},
            )
        self.into_vgg = incoming

    def _mask(self, layer: VggLayer, reads: dict[str, int], incoming: str, masked: str, size: int) -> None:
        """Apply the ReLU's mask in place, in a separate pass that the pass before could include."""
        self.ops.add(VGG_BACK, layer.relu, "mask", reads=reads, writes={masked: size}, through=incoming)

    def _transform_backward(self) -> None:
        assert self.into_vgg is not None
        images = self._bytes(3, self.side)
        self.ops.add(
            TRANSFORM_BACK,
            "ŷ",
            "scale, normalise",
            reads={self.into_vgg: images, self.pre_activation: images},
            writes={"d out placed": images},
            moved=launched_bytes("output_to_vgg_input_backward", self._shape(3, self.side), self.dtype),
        )
        # Name and bytes of the gradient around a block, until it is added.
        around: tuple[str, int] | None = None
        for index in reversed(range(len(self.convs))):
            conv = self.convs[index]
            source = "in to conv1" if index == 0 else f"{self.convs[index - 1].name} out"
            made = f"{conv.name} cut" if conv.transposed else f"{conv.name} conv"
            size, gradient = self._bytes(conv.outputs, conv.out), f"d {conv.name} placed"
            if conv.has_norm:
                reads = {gradient: self._bytes(conv.outputs, conv.laid_out), made: size}
                writes = {f"d {made}": size}
                if conv.residual and max(conv.layout.padding):
                    around = f"d around {conv.name}", size
                    writes[around[0]] = size
                elif conv.residual:
                    around = gradient, size  # also that of the residual
                self._norm(TRANSFORM_BACK, conv, reads, writes, backward=True)
                gradient = f"d {made}"
            if conv.transposed:
                self._crop(TRANSFORM_BACK, conv, gradient, f"d {conv.name} conv")
                gradient = f"d {conv.name} conv"
            reached = self._bytes(conv.outputs, conv.reach)
            self.ops.add(
                TRANSFORM_BACK,
                conv.name,
                "weight gradient",
                flops=self.batch * conv.flops,
                reads={gradient: reached, source: self._bytes(conv.inputs, conv.side)},
                writes={f"d {conv.name} weight": 4 * self._count(conv)},
                moved=reached + self._bytes(conv.inputs, conv.side) + self._weight_gradient_moved(conv),
            )
            if index == 0:
                break
            into = f"d {self.convs[index - 1].name} placed"
            if conv.name.endswith(".conv1"):
                into = f"d into {conv.name}"
            stored = self._bytes(conv.inputs, conv.side)
            self.ops.add(
                TRANSFORM_BACK,
                conv.name,
                "input gradient",
                flops=self.batch * conv.flops,
                reads={gradient: reached, **self._weight(conv)},
                writes={into: stored},
            )
            if conv.name.endswith(".conv1"):
                assert around is not None
                summed = f"d {self.convs[index - 1].name} placed"
                # A separate pass; the norm before could read both.
                self.ops.add(
                    TRANSFORM_BACK,
                    conv.name,
                    "sum",
                    reads={into: stored, around[0]: around[1]},
                    writes={summed: stored},
                    through=into,
                )

    def _count(self, conv: Conv) -> int:
        return conv.inputs * conv.outputs * conv.kernel**2

    def _weight_gradient_moved(self, conv: Conv) -> int:
        """Written in the products' type, then cast to the type of the weights."""
        return self._count(conv) * (4 if self.item == 4 else 2 * self.item + 4)

    def _update(self) -> None:
        count = sum(self._count(conv) + (2 if conv.has_norm else 1) * conv.outputs for conv in self.convs)
        size = 4 * count
        state = {"weights fp32": size, "first moments": size, "second moments": size}
        self.ops.add(UPDATE, "weights", "Adam", reads={"gradients": size, **state}, writes=state)
        self.ops.add(UPDATE, "weights", "are they finite", reads={"gradients": size, "weights fp32": size}, writes={})


def totals(operations: Sequence[Operation]) -> dict[str, int]:
    """Sums of FLOPs and bytes."""
    columns: dict[str, Callable[[Operation], int]] = {
        "flops": lambda op: op.flops,
        "minimum_bytes": lambda op: op.minimum_bytes,
        "moved_bytes": lambda op: op.moved_bytes,
    }
    return {name: sum(map(column, operations)) for name, column in columns.items()}
