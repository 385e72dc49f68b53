"""FP8 attention on one paged layout: append, decode, prefill, merge, reference.

A kernel knows no strategy: it is given a :class:`kernels.view.View` and reads what that points at.
"""
