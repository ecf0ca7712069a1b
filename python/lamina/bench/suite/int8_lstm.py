"""int8_lstm over whole sequences against eager nn.LSTM and torch's dynamic int8."""

from collections.abc import Iterator

from lamina.bench.suite import lstm
from lamina.bench.workloads import Workload


def workloads() -> Iterator[Workload]:
    """Every line of shapes/int8_lstm.txt."""
    return lstm.of("int8_lstm")
