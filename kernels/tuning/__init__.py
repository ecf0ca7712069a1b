"""Every number that is tuned for GPUs, with its reason: a module for each op that has such numbers.

Importable without Triton. A table names the tile of each case; `..._candidates` are what a sweep on a GPU tries beside
it.
"""
