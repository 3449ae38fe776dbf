"""Fake machines and probes for the tests of `fastnst doctor`."""
