"""int8_linear on a GPU, quantization and epilogue included, against bfloat16 and torch's own int8 product."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lamina
from lamina.bench import gpu
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.quant.weights import quantize_weight
from lamina.reference.int8_linear import ACTIVATIONS
from lamina.reference.int8_linear import int8_linear as reference

CHECKED_ROWS = 256
COMPILED = (4096, 4096, 4096)
# Sums are exact; the one rounding to bfloat16 is left.
MAX_ERROR = 2**-8


@dataclass(frozen=True)
class Inputs:
    """x: [M, K], weight: [N, K], bias: [N] bfloat16; codes, scale: the weight's."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    activation: str


def workloads() -> Iterator[Workload]:
    """Every line of shapes/gpu_int8_linear.txt."""
    for name, m, k, n, activation in read_shapes("gpu_int8_linear", columns=5):
        yield _workload(name, int(m), int(k), int(n), activation)


def _workload(name: str, m: int, k: int, n: int, activation: str) -> Workload:
    shape = f"{m}x{k}x{n}" + ("" if activation == "none" else f"-{activation}")

    def make_inputs() -> Inputs:
        generator = torch.Generator(gpu.DEVICE).manual_seed(m + k + n)

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=gpu.DEVICE, dtype=torch.bfloat16)

        weight = tensor(n, k) / k**0.5
        codes, scale = quantize_weight(weight)
        return Inputs(tensor(m, k), weight, tensor(n), codes, scale, activation)

    return Workload(
        id=f"gpu_int8_linear/{name}/{shape}",
        op="gpu_int8_linear",
        shape=shape,
        dims={"M": m, "K": k, "N": n},
        make_inputs=make_inputs,
        run=_lamina,
        # Compiling takes a while; one size says how much of the difference Inductor makes up.
        baselines={"eager": _eager, "int_mm": _int_mm}
        | ({"int_mm compiled": _int_mm_compiled} if (m, k, n) == COMPILED else {}),
        slow=frozenset({"int_mm compiled"}),
        check=_check,
        flops=lambda inputs: 2 * m * k * n,
        bytes=lambda inputs: 2 * m * (k + n) + n * k + 6 * n,
        precision=lambda inputs: "int8",
        tags=frozenset({"op", "gpu", name, "quick"}),
        device="cuda",
    )


def _lamina(inputs: Inputs) -> Callable[[], torch.Tensor]:
    packed = lamina.ops.pack_int8_weight(inputs.codes, inputs.scale)
    activation = None if inputs.activation == "none" else inputs.activation
    return lambda: lamina.ops.int8_linear(inputs.x, packed, inputs.bias, activation=activation)


def _eager(inputs: Inputs) -> Callable[[], torch.Tensor]:
    finish = ACTIVATIONS[inputs.activation]
    return lambda: finish(F.linear(inputs.x, inputs.weight, inputs.bias))


def _written_in_torch(inputs: Inputs) -> Callable[..., torch.Tensor]:
    """What one writes in PyTorch: rows quantized, torch._int_mm, scales, bias and activation."""
    finish, codes = ACTIVATIONS[inputs.activation], inputs.codes.t()

    def layer(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        steps = wide.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        rows = (wide / steps).round().clamp(-127, 127).to(torch.int8)
        return finish(torch._int_mm(rows, codes).float() * steps * scale + bias.float()).to(x.dtype)

    return layer


def _int_mm(inputs: Inputs) -> Callable[[], torch.Tensor]:
    layer = _written_in_torch(inputs)
    return lambda: layer(inputs.x, inputs.scale, inputs.bias)


def _int_mm_compiled(inputs: Inputs) -> Callable[[], torch.Tensor]:
    torch._dynamo.reset()
    layer = torch.compile(_written_in_torch(inputs), dynamic=False)
    return lambda: layer(inputs.x, inputs.scale, inputs.bias)


def _check(inputs: Inputs, output: torch.Tensor) -> Gate:
    truth = reference(inputs.x[:CHECKED_ROWS], inputs.codes, inputs.scale, inputs.bias, inputs.activation)
    error = relative_error(output[:CHECKED_ROWS], truth)
    return Gate.judge(error, MAX_ERROR, "relative error against the reference")
