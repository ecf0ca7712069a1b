"""rnn_relu over whole sequences against eager nn.RNN."""

from collections.abc import Iterator

from lamina.bench.suite import lstm
from lamina.bench.workloads import Workload


def workloads() -> Iterator[Workload]:
    """Every line of shapes/rnn_relu.txt."""
    return lstm.of("rnn_relu")
