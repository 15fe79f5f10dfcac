"""Triton kernels, one file per op family, installed as `fishleg_ext.kernels`."""
