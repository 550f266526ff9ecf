"""Benchmarks of robustkern; see benchmarks/README.md."""
