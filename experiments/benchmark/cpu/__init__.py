"""Benchmarks that any machine can run."""
