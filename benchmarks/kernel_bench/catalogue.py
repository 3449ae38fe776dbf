"""All ops that are timed, the most important first, since a run's time may be limited."""

from __future__ import annotations

from kernel_bench import image_ops, layer_ops, norm_ops
from kernel_bench.ops import Op

_EPILOGUES = tuple(norm_ops.EPILOGUES)

_ALL = (
    *(norm_ops.norm("instance_norm", epilogue) for epilogue in _EPILOGUES),
    layer_ops.STYLE_LOSS,
    layer_ops.MAX_POOL,
    layer_ops.MAX_UNPOOL,
    layer_ops.LOSS_RELU_STYLE,
    layer_ops.LOSS_RELU_CONTENT,
    layer_ops.GRAM_MATRIX,
    image_ops.OUTPUT_TO_VGG_INPUT,
    image_ops.OUTPUT_TO_VGG_INPUT_BACKWARD,
    *image_ops.UINT8_TO_INPUTS,
    *(norm_ops.norm("batch_norm_training", epilogue, training=True) for epilogue in _EPILOGUES),
    *(norm_ops.norm("batch_norm_inference", epilogue, training=False) for epilogue in _EPILOGUES),
)

OPS: dict[str, Op] = {op.name: op for op in _ALL}
