"""The log of a run: metrics.jsonl and TensorBoard event files."""
