"""Code for training on a CPU alone."""
