"""Memory: what a run needs, what is available, and what would fit."""
