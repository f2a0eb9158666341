"""Kernels for many dimensions in fixed point."""
