"""What `benchmarks/end_to_end.py` is made of: plain baselines, their agreement with fastnst, time and memory of steps."""
