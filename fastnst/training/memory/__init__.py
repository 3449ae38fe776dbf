"""How much memory a run needs, has, and what would fit."""
