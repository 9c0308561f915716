"""Runnable examples; the tests and benchmarks import their parts, so that they stay true."""
