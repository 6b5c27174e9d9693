"""Kernels, attention and graphs for NVIDIA GPUs; only imported where there is one."""
