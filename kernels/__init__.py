"""Triton kernels, one file per op, and the functions that launch them.

The package is importable without Triton, its modules are not: ops import them when a tensor on a GPU comes, and every
PyTorch for CUDA brings Triton. A launcher takes tensors and writes into outputs that it is given.
"""
