"""Benchmarks by the TPU compiler, which needs no TPU."""
