"""Triton kernels, one file per op. Importable without triton: kernels are compiled when they are first called."""
