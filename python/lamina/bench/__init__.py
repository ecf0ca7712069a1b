"""Benchmarks and reports: one registry of workloads, one way to time them, one format for what was measured.

`workloads.py` names what is timed, `timing.py` how, `machine.py` on what, `runner.py` joins the three behind a
correctness gate, `results.py` is the file that comes out. `targets.py` and `compare.py` read that file; `reporting/`
makes a page of it. `benchmarks/test_bench.py`, `lamina bench` and `lamina report` only iterate the registry.
"""
