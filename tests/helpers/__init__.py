"""What several tests share: inputs, fakes, counters, comparisons."""
