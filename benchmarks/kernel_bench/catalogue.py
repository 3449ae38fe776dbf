"""All ops that are timed, those that matter most first: a run that is short of time measures the first ones."""

from __future__ import annotations

from kernel_bench import layer_ops, norm_ops, picture_ops
from kernel_bench.ops import Op

_EPILOGUES = tuple(norm_ops.EPILOGUES)

_ALL = (
    *(norm_ops.norm("instance_norm", epilogue) for epilogue in _EPILOGUES),
    layer_ops.STYLE_LOSS,
    layer_ops.MAX_POOL,
    layer_ops.MAX_UNPOOL,
    layer_ops.TAP_STYLE,
    layer_ops.TAP_CONTENT,
    layer_ops.GRAM_MATRIX,
    picture_ops.BOUNDARY,
    picture_ops.BOUNDARY_BACKWARD,
    *picture_ops.PICTURE_INPUTS,
    *(norm_ops.norm("batch_norm_training", epilogue, training=True) for epilogue in _EPILOGUES),
    *(norm_ops.norm("batch_norm_inference", epilogue, training=False) for epilogue in _EPILOGUES),
)

OPS: dict[str, Op] = {op.name: op for op in _ALL}
