"""Benchmarks and the drills that are too long for the tests. Run as ``python -m bench.<name>``."""
