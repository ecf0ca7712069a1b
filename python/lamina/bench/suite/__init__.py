"""One file per op, each with a function `workloads()`; see `lamina.bench.workloads.registry`."""
