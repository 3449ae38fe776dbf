"""The `fastnst visualize` commands."""
