"""int8_gru over whole sequences against eager nn.GRU and torch's dynamic int8."""

from collections.abc import Iterator

from lamina.bench.suite import lstm
from lamina.bench.workloads import Workload


def workloads() -> Iterator[Workload]:
    """Every line of shapes/int8_gru.txt."""
    return lstm.of("int8_gru")
