"""Tests of devices, arenas, the page allocator and the strategies."""
