"""The perceptual loss: as autograd computes it, and fused with its own gradient."""
