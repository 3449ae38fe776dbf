"""Malformed files of every kind that the product reads, and a process that loads them."""
