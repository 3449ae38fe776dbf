"""Instance and batch norm with affine, residual, ReLU, nearest ×2 upsampling and padding in one op."""
