"""Parts of `benchmarks/end_to_end.py` and `roofline.py`: baselines, their check, time, memory, a cost model."""
