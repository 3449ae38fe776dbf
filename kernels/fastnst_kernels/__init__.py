"""Fused operations for neural style transfer: each a PyTorch path and Triton kernels behind one `torch.library` op.

They work under autograd, autocast, torch.compile and fake tensors, in channels_last and contiguous formats, and give
the same bits every time. `runtime` says which implementation runs; `kernels/README.md` has the formulas.
"""

from fastnst_kernels.gram.loss_relu_backward import tap_backward, tap_backward_reference
from fastnst_kernels.gram.style_loss import (
    StyleMatrix,
    gram_matrix,
    gram_matrix_reference,
    style_loss,
    style_loss_and_matrix,
    style_loss_reference,
)
from fastnst_kernels.image.image import (
    network_boundary,
    network_boundary_backward,
    network_boundary_backward_reference,
    network_boundary_reference,
    picture_input,
    picture_input_reference,
)
from fastnst_kernels.norm.batch_norm import batch_norm, batch_norm_reference
from fastnst_kernels.norm.instance_norm import instance_norm, instance_norm_reference
from fastnst_kernels.pool.max_pool import (
    max_pool2d_switches,
    max_pool2d_switches_reference,
    max_unpool2d_switches,
    max_unpool2d_switches_reference,
)

__all__ = [
    "StyleMatrix",
    "batch_norm",
    "batch_norm_reference",
    "gram_matrix",
    "gram_matrix_reference",
    "instance_norm",
    "instance_norm_reference",
    "max_pool2d_switches",
    "max_pool2d_switches_reference",
    "max_unpool2d_switches",
    "max_unpool2d_switches_reference",
    "network_boundary",
    "network_boundary_backward",
    "network_boundary_backward_reference",
    "network_boundary_reference",
    "picture_input",
    "picture_input_reference",
    "style_loss",
    "style_loss_and_matrix",
    "style_loss_reference",
    "tap_backward",
    "tap_backward_reference",
]
