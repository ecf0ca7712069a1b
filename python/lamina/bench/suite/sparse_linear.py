"""sparse_linear at the layers of pruned models, against the dense layer in eager PyTorch and torch's CSR product."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.ops.sparse_linear import PATTERNS
from lamina.reference.sparse_linear import sparse_linear as reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Float32 sums of up to 600 products, or one rounding to bfloat16.
MAX_ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Inputs:
    """x: [M, K], weight: [N, K] with its zeros, bias: [N], all of one dtype."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


def pruned(n: int, k: int, rows: int, columns: int, zeros: float, generator: torch.Generator) -> torch.Tensor:
    """A weight [n, k] with a share of `zeros`, in blocks of rows x columns that lie at random."""
    score = torch.rand(-(-n // rows), -(-k // columns), generator=generator)
    kept = torch.zeros(score.numel(), dtype=torch.bool)
    kept[score.flatten().topk(round(score.numel() * (1 - zeros))).indices] = True
    mask = kept.view(score.shape).repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:n, :k]
    return torch.randn(n, k, generator=generator) / (k * (1 - zeros)) ** 0.5 * mask


def workloads() -> Iterator[Workload]:
    """Every line of shapes/sparse_linear.txt at each of its row counts and shares of zeros, in every pattern."""
    for model, layer, k, n, rows, zeros, dtype in read_shapes("sparse_linear", columns=7):
        for m in rows.split(","):
            for percent in zeros.split(","):
                for pattern in PATTERNS:
                    yield _workload(model, layer, (int(m), int(k), int(n)), int(percent), DTYPES[dtype], pattern)


def _workload(
    model: str, layer: str, sizes: tuple[int, int, int], percent: int, dtype: torch.dtype, pattern: str
) -> Workload:
    m, k, n = sizes
    name = [] if dtype == torch.float32 else ["bfloat16"]
    shape = "-".join([f"{m}x{k}x{n}", pattern, f"{percent}", *name])
    rows = 1 if pattern == "unstructured" else int(pattern[0])
    kept = n * k * (100 - percent) // 100

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(m * 7 + k * 3 + n)
        x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator)
        weight = pruned(n, k, rows, 1, percent / 100, generator)
        return Inputs(x.to(dtype), weight.to(dtype), bias.to(dtype))

    return Workload(
        id=f"sparse_linear/{model}/{shape}",
        op="sparse_linear",
        shape=shape,
        dims={"M": m, "K": k, "N": n, "zeros": percent, "rows": rows},
        make_inputs=make_inputs,
        run=lambda inputs: _lamina(inputs, pattern),
        baselines={"eager": _eager, "csr": _csr} if dtype == torch.float32 else {"eager": _eager},
        check=_check,
        # Of the values that are not zero.
        flops=lambda inputs: 2 * m * kept,
        bytes=lambda inputs: dtype.itemsize * (m * (k + n) + kept) + 2 * kept // rows,
        precision=lambda inputs: "float32",
        tags=frozenset({"op", model, layer, pattern} | ({"quick"} if m == 128 and layer == "ffn_down" else set())),
    )


def _lamina(inputs: Inputs, pattern: str) -> Callable[[], torch.Tensor]:
    packed = lamina.ops.pack_sparse_weight(inputs.weight, pattern)
    return lambda: lamina.ops.sparse_linear(inputs.x, packed, inputs.bias)


def _eager(inputs: Inputs) -> Callable[[], torch.Tensor]:
    return lambda: F.linear(inputs.x, inputs.weight, inputs.bias)


def _csr(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """torch's own sparse product; its layout wants the transposed x."""
    weight, bias = inputs.weight.to_sparse_csr(), inputs.bias[:, None]
    return lambda: (weight @ inputs.x.t() + bias).t()


def _check(inputs: Inputs, output: torch.Tensor) -> Gate:
    truth = reference(inputs.x, inputs.weight, inputs.bias)
    return Gate.judge(relative_error(output, truth), MAX_ERROR[inputs.x.dtype], "relative error against the reference")
