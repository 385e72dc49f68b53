"""Timings of the kernels beside their peers, each behind a correctness gate."""
