"""Fused ops for neural style transfer: PyTorch and Triton kernels behind each `torch.library` op.

They work under autograd, autocast, torch.compile and fake tensors, in channels_last and contiguous formats, and give
the same bits every time. `runtime` chooses the implementation; `kernels/README.md` has the formulas.
"""

from fastnst_kernels.gram.loss_relu_backward import loss_relu_backward, loss_relu_backward_reference
from fastnst_kernels.gram.style_loss import (
    StyleMatrix,
    gram_matrix,
    gram_matrix_reference,
    style_loss,
    style_loss_and_matrix,
    style_loss_reference,
)
from fastnst_kernels.image.output_to_vgg_input import (
    output_to_vgg_input,
    output_to_vgg_input_backward,
    output_to_vgg_input_backward_reference,
    output_to_vgg_input_reference,
)
from fastnst_kernels.image.uint8_to_input import uint8_to_input, uint8_to_input_reference
from fastnst_kernels.norm.batch_norm import batch_norm, batch_norm_reference
from fastnst_kernels.norm.instance_norm import instance_norm, instance_norm_reference
from fastnst_kernels.pool.max_pool import (
    max_pool2d_switches,
    max_pool2d_switches_reference,
    max_unpool2d_switches,
    max_unpool2d_switches_reference,
)

# The names that these functions had before.
network_boundary, network_boundary_reference = output_to_vgg_input, output_to_vgg_input_reference
network_boundary_backward = output_to_vgg_input_backward
network_boundary_backward_reference = output_to_vgg_input_backward_reference
picture_input, picture_input_reference = uint8_to_input, uint8_to_input_reference
tap_backward, tap_backward_reference = loss_relu_backward, loss_relu_backward_reference

__all__ = [
    "StyleMatrix",
    "batch_norm",
    "batch_norm_reference",
    "gram_matrix",
    "gram_matrix_reference",
    "instance_norm",
    "instance_norm_reference",
    "loss_relu_backward",
    "loss_relu_backward_reference",
    "max_pool2d_switches",
    "max_pool2d_switches_reference",
    "max_unpool2d_switches",
    "max_unpool2d_switches_reference",
    "output_to_vgg_input",
    "output_to_vgg_input_backward",
    "output_to_vgg_input_backward_reference",
    "output_to_vgg_input_reference",
    "style_loss",
    "style_loss_and_matrix",
    "style_loss_reference",
    "uint8_to_input",
    "uint8_to_input_reference",
]
