"""Benchmarks of this package, run from the repository's root: `python -m benchmarks.NAME`, or the three scripts there."""
