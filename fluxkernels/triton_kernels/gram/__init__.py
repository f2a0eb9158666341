"""Kernels for many dimensions."""
