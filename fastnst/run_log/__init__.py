"""What a run writes down: metrics.jsonl and TensorBoard's event files."""
