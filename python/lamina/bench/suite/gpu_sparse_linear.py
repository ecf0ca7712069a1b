"""sparse_linear on a GPU, of weights that were pruned in blocks, against the dense product."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lamina
from lamina.bench import gpu
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error

CHECKED_ROWS = 256
# Products of bfloat16 summed in float32, and one rounding.
MAX_ERROR = 2**-8


@dataclass(frozen=True)
class Inputs:
    """x: [M, K], weight: [N, K] with its zeros, bias: [N], bfloat16."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


def workloads() -> Iterator[Workload]:
    """Every line of shapes/gpu_sparse_linear.txt."""
    for name, m, k, n, pattern, zeros in read_shapes("gpu_sparse_linear", columns=6):
        yield _workload(name, int(m), int(k), int(n), pattern, int(zeros))


def _workload(name: str, m: int, k: int, n: int, pattern: str, zeros: int) -> Workload:
    shape = f"{m}x{k}x{n}-{pattern.replace(':', 'of')}-{zeros}zeros"

    def make_inputs() -> Inputs:
        generator = torch.Generator(gpu.DEVICE).manual_seed(m + zeros)

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=gpu.DEVICE, dtype=torch.bfloat16)

        weight = tensor(n, k) / k**0.5
        if pattern == "2:4":
            drop = weight.float().abs().view(n, k // 4, 4).argsort(-1)[..., :2]
            weight.view(n, k // 4, 4).scatter_(-1, drop, 0)
        else:
            rows, columns = map(int, pattern.split("x"))
            draws = torch.rand(n // rows, 1, k // columns, 1, generator=generator, device=gpu.DEVICE)
            weight.view(n // rows, rows, k // columns, columns).mul_(draws >= zeros / 100)
        return Inputs(tensor(m, k), weight, tensor(n))

    return Workload(
        id=f"gpu_sparse_linear/{name}/{shape}",
        op="gpu_sparse_linear",
        shape=shape,
        dims={"M": m, "K": k, "N": n, "ZEROS": zeros},
        make_inputs=make_inputs,
        run=lambda inputs: _lamina(inputs, pattern),
        baselines={"dense": lambda inputs: lambda: F.linear(inputs.x, inputs.weight, inputs.bias)},
        check=_check,
        flops=lambda inputs: 2 * m * k * n * (100 - zeros) // 100,
        bytes=lambda inputs: 2 * m * (k + n) + 2 * n * k * (100 - zeros) // 100,
        precision=lambda inputs: "bf16",
        tags=frozenset({"op", "gpu", name, "quick"}),
        device="cuda",
    )


def _lamina(inputs: Inputs, pattern: str) -> Callable[[], torch.Tensor]:
    packed = lamina.ops.pack_sparse_weight(inputs.weight, pattern)
    return lambda: lamina.ops.sparse_linear(inputs.x, packed, inputs.bias)


def _check(inputs: Inputs, output: torch.Tensor) -> Gate:
    truth = inputs.x[:CHECKED_ROWS].double() @ inputs.weight.double().T + inputs.bias.double()
    return Gate.judge(relative_error(output[:CHECKED_ROWS], truth), MAX_ERROR, "relative error against the reference")
