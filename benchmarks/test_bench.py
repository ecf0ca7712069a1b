"""The workload registry under pytest-benchmark: `pytest benchmarks --benchmark-only -k int8_linear`.

The gate comes first here too: a wrong answer fails the test before anything is timed. For ratios, which is what counts,
use `lamina bench`; it times contenders in turns, where pytest-benchmark times one after the other.
"""

import pytest
import torch

from lamina.bench import workloads
from lamina.bench.peers import Unavailable


def finished(workload, call):
    """The call, done when it returns: pytest-benchmark reads the host's clock."""
    if workload.device == "cpu":
        return call
    return lambda: (call(), torch.cuda.synchronize())[0]


@pytest.mark.parametrize("workload", workloads.registry().values(), ids=lambda workload: workload.id)
def test_lamina(benchmark, workload):
    reason = workload.missing()
    if reason is not None:
        pytest.skip(reason)
    inputs = workload.make_inputs()
    call = workload.run(inputs)
    with torch.inference_mode():
        gate = workload.check(inputs, call())
        assert gate.ok, gate.message
        benchmark.group = workload.op
        benchmark(finished(workload, call))


@pytest.mark.parametrize(
    ("workload", "baseline"),
    [
        pytest.param(workload, name, id=f"{workload.id}-{name}")
        for workload in workloads.registry().values()
        for name in workload.baselines
    ],
)
def test_baseline(benchmark, workload, baseline):
    reason = workload.missing()
    if reason is not None:
        pytest.skip(reason)
    try:
        call = workload.baselines[baseline](workload.make_inputs())
    except Unavailable as error:
        pytest.skip(str(error))
    with torch.inference_mode():
        benchmark.group = workload.op
        benchmark(finished(workload, call))
