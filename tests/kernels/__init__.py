"""Tests of the kernels: against float64, in the interpreter, as sm_90 code and on a GPU."""
