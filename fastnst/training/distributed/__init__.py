"""Several processes that share each step."""
