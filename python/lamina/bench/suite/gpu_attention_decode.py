"""One step of generation on a GPU, a new token of each sequence over its cache, against torch's attention."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lamina
from lamina.bench import gpu
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.attention_decode import attention_decode as reference

DTYPES = ("bfloat16", "int8")


@dataclass(frozen=True)
class Inputs:
    """q: [B, 1, H, D]; cache: the keyword arguments of our call; floats: keys and values [B, Hkv, S, D] for torch's."""

    q: torch.Tensor
    lengths: torch.Tensor
    cache: dict
    floats: tuple[torch.Tensor, torch.Tensor]


def workloads() -> Iterator[Workload]:
    """Every line of shapes/gpu_attention_decode.txt."""
    for name, *sizes, dtype in read_shapes("gpu_attention_decode", columns=7):
        if dtype not in DTYPES:
            raise ValueError(f"shapes/gpu_attention_decode.txt has {dtype}; dtypes: {', '.join(DTYPES)}")
        yield _workload(name, *map(int, sizes), dtype)


def _workload(name: str, b: int, h: int, hkv: int, s: int, d: int, dtype: str) -> Workload:
    heads = str(h) if h == hkv else f"{h}kv{hkv}"
    shape = f"{b}x{heads}x1k{s}x{d}-{dtype}"
    cache_bytes = 2 * b * hkv * s * (2 * d if dtype == "bfloat16" else d + 4)

    def make_inputs() -> Inputs:
        generator = torch.Generator(gpu.DEVICE).manual_seed(b + s)

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=gpu.DEVICE, dtype=torch.bfloat16)

        q, floats = tensor(b, 1, h, d), (tensor(b, s, hkv, d), tensor(b, s, hkv, d))
        if dtype == "int8":
            (k, k_scale), (v, v_scale) = map(_quantized, floats)
            cache = {"k_cache": k, "v_cache": v, "k_scale": k_scale, "v_scale": v_scale}
            floats = tuple((c * scale[..., None]).bfloat16() for c, scale in ((k, k_scale), (v, v_scale)))
        else:
            cache = {"k_cache": floats[0], "v_cache": floats[1]}
        lengths = torch.full((b,), s, dtype=torch.int32, device=gpu.DEVICE)
        return Inputs(q, lengths, cache, tuple(t.transpose(1, 2).contiguous() for t in floats))

    return Workload(
        id=f"gpu_attention_decode/{name}/{shape}",
        op="gpu_attention_decode",
        shape=shape,
        dims={"B": b, "H": h, "HKV": hkv, "S": s, "D": d},
        make_inputs=make_inputs,
        run=lambda inputs: lambda: lamina.ops.attention_decode(inputs.q, cache_seqlens=inputs.lengths, **inputs.cache),
        baselines={"sdpa": _sdpa} | ({"sdpa grouped": _sdpa_grouped} if h != hkv else {}),
        check=_check,
        flops=lambda inputs: 4 * b * h * s * d,
        bytes=lambda inputs: cache_bytes,
        precision=lambda inputs: "bf16",
        tags=frozenset({"op", "gpu", name, dtype, "quick"}),
        device="cuda",
    )


def _quantized(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = t.float().abs().amax(-1) / 127
    return (t.float() / scale[..., None]).round().to(torch.int8), scale


def _sdpa(inputs: Inputs):
    q, (k, v) = inputs.q.transpose(1, 2), inputs.floats
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _sdpa_grouped(inputs: Inputs):
    """The heads that share keys as queries of one head: what a careful user would write."""
    b, _, h, d = inputs.q.shape
    k, v = inputs.floats
    q = inputs.q.view(b, k.shape[1], h // k.shape[1], d)
    return lambda: F.scaled_dot_product_attention(q, k, v)


def _check(inputs: Inputs, output: torch.Tensor) -> Gate:
    # Not further from the float64 truth than twice torch's own, plus a rounding: the first two sequences.
    some = slice(0, 2)
    cache = {name: t[some] for name, t in inputs.cache.items()}
    truth, _ = reference(inputs.q[some].double(), cache_seqlens=inputs.lengths[some], **cache)
    two = Inputs(inputs.q[some], inputs.lengths[some], cache, tuple(t[some] for t in inputs.floats))
    yardstick = relative_error(_sdpa(two)().transpose(1, 2), truth)
    limit = 2 * yardstick + torch.finfo(torch.bfloat16).eps
    return Gate.judge(relative_error(output[some], truth), limit, "relative error against the reference")
