"""Triton kernels; nothing here imports triton until a kernel is asked for."""
