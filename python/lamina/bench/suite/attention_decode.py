"""attention_decode at the shapes of named models against scaled_dot_product_attention over the same cache."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.attention_decode import attention_decode as reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
LAYOUTS = ("heads", "tokens", "paged")
BLOCK = 256


@dataclass(frozen=True)
class Inputs:
    """q: [B, L, H, D]; of each layer the keyword arguments of our call, and keys and values [B, Hkv, S, D] for torch's.

    An int8 cache is given to torch as floats, dequantized beforehand.
    """

    q: torch.Tensor
    lengths: torch.Tensor
    caches: Sequence[dict]
    floats: Sequence[tuple[torch.Tensor, torch.Tensor]]


def workloads() -> Iterator[Workload]:
    """Every line of shapes/attention_decode.txt."""
    for model, *sizes, dtype, layout, layers in read_shapes("attention_decode", columns=10):
        if dtype not in DTYPES or layout not in LAYOUTS:
            raise ValueError(
                f"shapes/attention_decode.txt has {dtype} {layout}; dtypes: {', '.join(DTYPES)}; layouts: "
                f"{', '.join(LAYOUTS)}"
            )
        yield _workload(model, *map(int, sizes), dtype, layout, int(layers))


def _workload(
    model: str, b: int, h: int, hkv: int, new: int, s: int, d: int, dtype: str, layout: str, layers: int
) -> Workload:
    heads = str(h) if h == hkv else f"{h}kv{hkv}"
    shape = f"{b}x{heads}x{new}k{s}x{d}-{dtype}-{layout}" + (f"-{layers}layers" if layers > 1 else "")
    cache_bytes = 2 * b * hkv * s * (d * DTYPES[dtype].itemsize + (4 if dtype == "int8" else 0))
    query_type = torch.float32 if dtype == "int8" else DTYPES[dtype]

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(b + h + s * 3 + d)
        q = torch.randn(b, new, h, d, generator=generator).to(query_type)
        caches, floats = [], []
        for _ in range(layers):
            k, v = (torch.randn(b, s, hkv, d, generator=generator) for _ in range(2))
            arguments = {}
            if dtype == "int8":
                (k, arguments["k_scale"]), (v, arguments["v_scale"]) = (
                    lamina.ops.quantize_rows(t.view(-1, d)) for t in (k, v)
                )
                k, v = k.view(b, s, hkv, d), v.view(b, s, hkv, d)
                arguments = {name: scale.view(b, s, hkv) for name, scale in arguments.items()}
            else:
                k, v = k.to(query_type), v.to(query_type)
            floats.append(
                tuple(
                    _heads_first(t if scale is None else t * scale[..., None])
                    for t, scale in zip((k, v), (arguments.get("k_scale"), arguments.get("v_scale")), strict=True)
                )
            )
            if layout == "paged":
                blocks = b * (s // BLOCK)
                k, v = (t.reshape(blocks, BLOCK, hkv, d) for t in (k, v))
                order = torch.randperm(blocks, generator=generator)
                k, v = k[order], v[order]
                arguments["block_table"] = order.argsort().to(torch.int32).view(b, -1)
            if layout == "heads":
                k, v = (_heads_first(t).transpose(1, 2) for t in (k, v))
            caches.append({"k_cache": k, "v_cache": v, **arguments})
        return Inputs(q, torch.full((b,), s, dtype=torch.int32), caches, floats)

    return Workload(
        id=f"attention_decode/{model}/{shape}",
        op="attention_decode",
        shape=shape,
        dims={"B": b, "H": h, "HKV": hkv, "L": new, "S": s, "D": d, "LAYERS": layers},
        make_inputs=make_inputs,
        run=_lamina,
        baselines={"sdpa": _sdpa} | ({"sdpa grouped": _sdpa_grouped} if h != hkv and new == 1 else {}),
        check=_check,
        flops=lambda inputs: 4 * b * h * new * s * d,
        bytes=lambda inputs: cache_bytes,
        resident=lambda inputs: layers * cache_bytes,
        precision=lambda inputs: "bf16" if dtype == "bfloat16" else "float32",
        tags=frozenset({"op", model, dtype, layout} | ({"quick"} if s <= 512 else set())),
    )


def _heads_first(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(1, 2).contiguous()


def _in_turns(calls: Sequence[Callable[[], torch.Tensor]]):
    following = itertools.cycle(calls)
    return lambda: next(following)()


def _lamina(inputs: Inputs):
    decode, q, lengths = lamina.ops.attention_decode, inputs.q, inputs.lengths
    return _in_turns([lambda c=c: decode(q, cache_seqlens=lengths, **c) for c in inputs.caches])


def _mask(q: torch.Tensor, keys: int) -> torch.Tensor | None:
    """Bottom-right causal among several new queries."""
    new = q.shape[1]
    return None if new == 1 else torch.ones(new, keys, dtype=torch.bool).tril(keys - new)


def _sdpa(inputs: Inputs):
    q, gqa = inputs.q.transpose(1, 2), inputs.q.shape[2] != inputs.floats[0][0].shape[1]
    mask = _mask(inputs.q, inputs.floats[0][0].shape[2])
    sdpa = F.scaled_dot_product_attention
    return _in_turns([lambda k=k, v=v: sdpa(q, k, v, attn_mask=mask, enable_gqa=gqa) for k, v in inputs.floats])


def _sdpa_grouped(inputs: Inputs):
    """The heads that share keys as queries of one head: what a careful user would write."""
    b, _, h, d = inputs.q.shape
    hkv = inputs.floats[0][0].shape[1]
    q = inputs.q.view(b, hkv, h // hkv, d)
    return _in_turns([lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v) for k, v in inputs.floats])


def _check(inputs: Inputs, output: torch.Tensor) -> Gate:
    # STYLE: not further from the float64 truth than twice torch's own kernel of the same dtype, plus one rounding.
    cache = inputs.caches[0]
    truth, _ = reference(inputs.q.double(), cache_seqlens=inputs.lengths, **cache)
    yardstick = relative_error(_sdpa(inputs)().transpose(1, 2), truth)
    limit = 2 * yardstick + torch.finfo(inputs.q.dtype).eps
    return Gate.judge(relative_error(output, truth), limit, "relative error against the reference")
