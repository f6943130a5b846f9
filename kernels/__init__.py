"""Triton kernels, importable as ``scfm.kernels``.

Modules here import torch and triton only, never scfm: each holds kernels and their launchers, which check nothing
but what a launch needs. The operators in ``scfm.ops`` check arguments, choose between implementations and
are what everything else calls.
"""
