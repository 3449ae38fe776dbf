"""Data parallelism: several processes that share each step."""
