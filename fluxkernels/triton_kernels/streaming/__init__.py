"""Kernels for few dimensions."""
