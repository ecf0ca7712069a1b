"""Attention of sequences of different lengths on a GPU: without padding, against torch's call with it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lamina
from lamina.bench import gpu
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.attention import attention as reference


@dataclass(frozen=True)
class Inputs:
    """q: [T, H, D], k, v: [T, Hkv, D], one sequence behind the other; padded: the same as [B, H, S, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    ends: torch.Tensor
    lengths: list[int]
    padded: tuple[torch.Tensor, ...]


def workloads() -> Iterator[Workload]:
    """Every line of shapes/gpu_attention_varlen.txt."""
    for name, *sizes in read_shapes("gpu_attention_varlen", columns=7):
        yield _workload(name, *map(int, sizes))


def _workload(name: str, b: int, h: int, hkv: int, shortest: int, longest: int, d: int) -> Workload:
    lengths = torch.linspace(shortest, longest, b).round().int().tolist()
    heads = str(h) if h == hkv else f"{h}kv{hkv}"
    shape = f"{b}x{heads}x{shortest}to{longest}x{d}-causal"

    def make_inputs() -> Inputs:
        generator = torch.Generator(gpu.DEVICE).manual_seed(b)

        def tensor(heads: int) -> torch.Tensor:
            return torch.randn(sum(lengths), heads, d, generator=generator, device=gpu.DEVICE, dtype=torch.bfloat16)

        def padded(t: torch.Tensor) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(t.split(lengths), batch_first=True).transpose(1, 2)

        parts = tensor(h), tensor(hkv), tensor(hkv)
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(gpu.DEVICE)
        return Inputs(*parts, ends, lengths, tuple(padded(t).contiguous() for t in parts))

    return Workload(
        id=f"gpu_attention_varlen/{name}/{shape}",
        op="gpu_attention_varlen",
        shape=shape,
        dims={"B": b, "H": h, "HKV": hkv, "S": longest, "D": d},
        make_inputs=make_inputs,
        run=_lamina,
        # Causal queries never see the padding behind their sequence, so that no mask slows torch's kernels down.
        baselines={"sdpa padded": _padded},
        check=_check,
        flops=lambda inputs: 4 * h * d * sum(n * (n + 1) // 2 for n in lengths),
        bytes=lambda inputs: 4 * sum(lengths) * d * (h + hkv),
        precision=lambda inputs: "bf16",
        tags=frozenset({"op", "gpu", name, "quick"}),
        device="cuda",
    )


def _lamina(inputs: Inputs):
    most = max(inputs.lengths)
    arguments = inputs.q, inputs.k, inputs.v, inputs.ends, inputs.ends, most, most
    return lambda: lamina.ops.attention_varlen(*arguments, is_causal=True)


def _padded(inputs: Inputs):
    gqa = inputs.q.shape[1] != inputs.k.shape[1]
    return lambda: F.scaled_dot_product_attention(*inputs.padded, is_causal=True, enable_gqa=gqa)


def _check(inputs: Inputs, output: torch.Tensor) -> Gate:
    """The first and the last sequence, as attention alone is judged."""
    errors = []
    for b in (0, len(inputs.lengths) - 1):
        length, start = inputs.lengths[b], sum(inputs.lengths[:b])
        q, k, v = (t[b : b + 1, :, :length] for t in inputs.padded)
        gqa = q.shape[1] != k.shape[1]
        truth = reference(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=gqa)
        eager = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        ours = output[start : start + length].transpose(0, 1)[None]
        limit = 2 * relative_error(eager, truth) + torch.finfo(torch.bfloat16).eps
        errors.append((relative_error(ours, truth), limit))
    return Gate.judge(*max(errors, key=lambda pair: pair[0] / pair[1]), "relative error against the reference")
