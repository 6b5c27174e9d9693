"""Kernels in C for CPUs: what torch has no operation for, or none that is fast enough."""
