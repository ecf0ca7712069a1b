"""rms_norm at the rows of named models, with and without the sum before it, against eager PyTorch."""

from collections.abc import Iterator

import torch.nn.functional as F

import lamina
from lamina.bench.suite.layer_norm import norm_workloads
from lamina.bench.workloads import Workload
from lamina.reference.rms_norm import rms_norm as reference


def workloads() -> Iterator[Workload]:
    """Every line of shapes/rms_norm.txt."""
    return norm_workloads("rms_norm", 1, lamina.ops.rms_norm, F.rms_norm, reference)
