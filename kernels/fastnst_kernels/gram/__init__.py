"""Gram matrices, the style loss, and the gradient of all loss terms at a ReLU."""
