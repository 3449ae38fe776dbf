"""One training step: launched, or captured as a CUDA graph."""
