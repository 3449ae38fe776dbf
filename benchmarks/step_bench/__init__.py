"""What `benchmarks/end_to_end.py` and `roofline.py` are made of: baselines, their check, time, memory, a model."""
