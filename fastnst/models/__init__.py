"""The two networks: the transform net that is trained, and the frozen loss network φ that judges it."""
