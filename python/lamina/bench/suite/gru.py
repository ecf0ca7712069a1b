"""gru over whole sequences against eager nn.GRU."""

from collections.abc import Iterator

from lamina.bench.suite import lstm
from lamina.bench.workloads import Workload


def workloads() -> Iterator[Workload]:
    """Every line of shapes/gru.txt."""
    return lstm.of("gru")
