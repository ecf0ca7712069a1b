"""attention at the shapes of named models against scaled_dot_product_attention."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.attention import attention as reference

# "float32_bf16" is float32 computed in bfloat16, "bfloat16_int8" has its scores computed in int8.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float32_bf16": torch.float32,
    "bfloat16_int8": torch.bfloat16,
}
PRECISIONS = {
    "float32": {},
    "float32_bf16": {"compute_dtype": torch.bfloat16},
    "bfloat16_int8": {"qk_dtype": torch.int8},
}
# A number behind "window" is how many keys to the left of its own a query takes, beside its own.
MASKS = ("none", "causal", "additive", "boolean", "window256")


# Of scores from codes of 8 bits, in the output, relative to its norm.
INT8_ERROR = 0.02


@dataclass(frozen=True)
class Inputs:
    """q: [B, H, Q, D], k: [B, Hkv, S, D], v: [B, Hkv, S, Dv].

    options: the keyword arguments of torch's call, which say the same in the reference.
    own: what lamina takes in their place, and how it shall compute.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict
    own: dict


def workloads() -> Iterator[Workload]:
    """Every line of shapes/attention.txt."""
    for model, *sizes, dtype, mask in read_shapes("attention", columns=10):
        if dtype not in DTYPES or mask not in MASKS:
            raise ValueError(
                f"shapes/attention.txt has {dtype} {mask}; dtypes: {', '.join(DTYPES)}; masks: {', '.join(MASKS)}"
            )
        yield _workload(model, *map(int, sizes), dtype, mask)
    yield _panels_workload(12, 128, 64)


def _workload(model: str, b: int, h: int, hkv: int, q: int, s: int, d: int, dv: int, dtype: str, mask: str) -> Workload:
    heads = str(h) if h == hkv else f"{h}kv{hkv}"
    tokens = str(q) if q == s else f"{q}k{s}"
    size = str(d) if d == dv else f"{d}v{dv}"
    shape = f"{b}x{heads}x{tokens}x{size}-{dtype}" + ("" if mask == "none" else f"-{mask}")
    # A causal call needs only the scores on and below the diagonal, and no kernel is credited for computing the others.
    window = int(mask.removeprefix("window")) if mask.startswith("window") else None
    if window is None:
        scores = b * h * (q * (q + 1) // 2 if mask == "causal" else q * s)
    else:
        scores = b * h * sum(min(i, window) + 1 for i in range(q))
    width = DTYPES[dtype].itemsize
    mask_bytes = {"additive": b * q * s * width, "boolean": b * q * s}.get(mask, 0)

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(b + h + q * 3 + s + d)

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(DTYPES[dtype])

        options: dict = {"is_causal": mask == "causal", "enable_gqa": h != hkv}
        if mask in ("additive", "boolean"):
            keep = torch.rand(b, 1, q, s, generator=generator) < 0.8
            keep[..., 0] = True  # torch gives NaN for a row that may look at nothing, and NaN can't be compared
            additive = torch.zeros(keep.shape, dtype=DTYPES[dtype]).masked_fill(~keep, float("-inf"))
            options["attn_mask"] = keep if mask == "boolean" else additive
        own = dict(options)
        if window is not None:
            own |= {"is_causal": True, "window": (window, 0)}
            behind = torch.arange(q)[:, None] - torch.arange(s)
            options["attn_mask"] = (behind >= 0) & (behind <= window)
        own |= PRECISIONS.get(dtype, {})
        return Inputs(tensor(b, h, q, d), tensor(b, hkv, s, d), tensor(b, hkv, s, dv), options, own)

    return Workload(
        id=f"attention/{model}/{shape}",
        op="attention",
        shape=shape,
        dims={"B": b, "H": h, "HKV": hkv, "Q": q, "S": s, "D": d, "DV": dv},
        make_inputs=make_inputs,
        run=_lamina,
        baselines={"sdpa": _sdpa},
        variants={"plain": _unmasked} if mask in ("additive", "boolean") else {},
        check=_check,
        flops=lambda inputs: 2 * scores * (d + dv),
        bytes=lambda inputs: width * b * (h * q * (d + dv) + hkv * s * (d + dv)) + mask_bytes,
        precision=lambda inputs: "float32" if dtype == "float32" else "bf16",
        tags=frozenset({"op", model, dtype, mask} | ({"quick"} if q * s <= 512 * 512 else set())),
        module=lambda inputs: (_Sdpa(inputs.options), (inputs.q, inputs.k, inputs.v)),
    )


def _panels_workload(h: int, tokens: int, d: int) -> Workload:
    """Attention as it stands between sparse int8 layers: from panels to panels, in bfloat16."""
    rows = _workload("bert_base", 1, h, h, tokens, tokens, d, d, "float32_bf16", "none")
    shape = f"1x{h}x{tokens}x{d}-panels"

    def panels(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return tuple(lamina.ops.token_panels(t.transpose(1, 2).flatten(2)) for t in (inputs.q, inputs.k, inputs.v))

    def run(inputs: Inputs):
        q, k, v = panels(inputs)
        options = {"length": tokens, "heads": h, "compute_dtype": torch.bfloat16}
        return lambda: lamina.ops.attention_panels(q, k, v, **options)

    return replace(
        rows,
        id=f"attention/bert_base/{shape}",
        shape=shape,
        run=run,
        variants={"rows": _lamina},
        check=lambda inputs, output: _check(inputs, _heads_of(output, tokens, h)),
        tags=frozenset({"op", "bert_base", "panels", "quick"}),
        module=None,
    )


def _heads_of(panels: torch.Tensor, tokens: int, heads: int) -> torch.Tensor:
    return lamina.ops.token_rows(panels, (1, tokens)).unflatten(2, (heads, -1)).transpose(1, 2)


class _Sdpa(torch.nn.Module):
    """scaled_dot_product_attention as a module, for peers that convert modules."""

    def __init__(self, options: dict):
        super().__init__()
        self.options = options

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.options)


def _lamina(inputs: Inputs):
    return lambda: lamina.ops.attention(inputs.q, inputs.k, inputs.v, **inputs.own)


def _unmasked(inputs: Inputs):
    return lambda: lamina.ops.attention(inputs.q, inputs.k, inputs.v, **(inputs.own | {"attn_mask": None}))


def _sdpa(inputs: Inputs):
    return lambda: F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, **inputs.options)


def _check(inputs: Inputs, output: torch.Tensor) -> Gate:
    # STYLE: not further from the float64 truth than twice torch's own kernel of the same dtype, plus one rounding.
    options = dict(inputs.options)
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        options["attn_mask"] = mask.double()
    truth = reference(inputs.q.double(), inputs.k.double(), inputs.v.double(), **options)
    yardstick = relative_error(_sdpa(inputs)(), truth)
    limit = 2 * yardstick + torch.finfo(inputs.own.get("compute_dtype", inputs.q.dtype)).eps
    if "qk_dtype" in inputs.own:
        limit += INT8_ERROR
    return Gate.judge(relative_error(output, truth), limit, "relative error against the reference")
