"""attention on a GPU against every backend of scaled_dot_product_attention and FlexAttention."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import lamina
from lamina.bench import gpu
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.attention import attention as reference

MASKS = ("none", "causal", "additive", "window1024")
BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Compiling it takes half a minute, so only where it is the rival that people would take.
FLEX = ("llama_8k", "biased", "windowed")
# Heads and queries that are compared with float64, whose scores are stored as a whole.
CHECKED_HEADS, CHECKED_QUERIES = 2, 1024


@dataclass(frozen=True)
class Inputs:
    """q: [B, H, S, D], k, v: [B, Hkv, S, D]; options: of torch's call; own: of lamina's, which says the same."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict
    own: dict
    window: int | None = None
    leaves: tuple[torch.Tensor, ...] = field(default=())


def workloads() -> Iterator[Workload]:
    """Every line of shapes/gpu_attention.txt."""
    for name, *sizes, mask in read_shapes("gpu_attention", columns=7):
        if mask not in MASKS:
            raise ValueError(f"shapes/gpu_attention.txt has the mask {mask}; masks: {', '.join(MASKS)}")
        yield _workload(name, *map(int, sizes), mask)


def window_of(mask: str) -> int | None:
    return int(mask.removeprefix("window")) if mask.startswith("window") else None


def scores_of(s: int, mask: str) -> int:
    """The scores a head needs; no kernel is credited for computing others."""
    window = window_of(mask)
    if window is not None:
        return sum(min(i, window) + 1 for i in range(s))
    return s * (s + 1) // 2 if mask == "causal" else s * s


def make_inputs(b: int, h: int, hkv: int, s: int, d: int, mask: str, seed: int) -> Inputs:
    generator = torch.Generator(gpu.DEVICE).manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=gpu.DEVICE, dtype=torch.bfloat16)

    window = window_of(mask)
    options: dict = {"is_causal": mask == "causal", "enable_gqa": h != hkv}
    own = dict(options)
    if mask == "additive":
        options["attn_mask"] = own["attn_mask"] = tensor(b, h, s, s)
    if window is not None:
        place = torch.arange(s, device=gpu.DEVICE)
        behind = place[:, None] - place
        options["attn_mask"] = (behind >= 0) & (behind <= window)
        own |= {"is_causal": True, "window": (window, 0)}
    return Inputs(tensor(b, h, s, d), tensor(b, hkv, s, d), tensor(b, hkv, s, d), options, own, window)


def _workload(name: str, b: int, h: int, hkv: int, s: int, d: int, mask: str) -> Workload:
    heads = str(h) if h == hkv else f"{h}kv{hkv}"
    shape = f"{b}x{heads}x{s}x{d}" + ("" if mask == "none" else f"-{mask}")
    backends = {backend: sdpa(kind) for backend, kind in BACKENDS.items()}
    return Workload(
        id=f"gpu_attention/{name}/{shape}",
        op="gpu_attention",
        shape=shape,
        dims={"B": b, "H": h, "HKV": hkv, "S": s, "D": d},
        make_inputs=lambda: make_inputs(b, h, hkv, s, d, mask, s + d),
        run=lambda inputs: lambda: lamina.ops.attention(inputs.q, inputs.k, inputs.v, **inputs.own),
        baselines=backends | ({"flex": flex} if name in FLEX else {}),
        slow=frozenset({"flex"}),
        check=check,
        flops=lambda inputs: 4 * b * h * scores_of(s, mask) * d,
        bytes=lambda inputs: 4 * b * s * d * (h + hkv) + (2 * b * h * s * s if mask == "additive" else 0),
        precision=lambda inputs: "bf16",
        tags=frozenset({"op", "gpu", name, mask, "quick"}),
        device="cuda",
    )


def sdpa(backend: SDPBackend) -> Callable[[Inputs], Callable[[], torch.Tensor]]:
    """Prepares torch's call on one backend, which raises where that does not take it."""

    def prepare(inputs: Inputs) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, **inputs.options)

        return call

    return prepare


def flex(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """FlexAttention, compiled, with blocks that the mask excludes left out."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    s, window = inputs.q.shape[2], inputs.window
    bias = None if window is not None else inputs.options.get("attn_mask")
    options: dict = {"enable_gqa": inputs.options["enable_gqa"]}
    if bias is not None:
        options["score_mod"] = lambda score, b, h, i, j: score + bias[b, h, i, j]
    elif window is not None:
        keep = lambda b, h, i, j: (i >= j) & (i - j <= window)  # noqa: E731
        options["block_mask"] = create_block_mask(keep, None, None, s, s, device=gpu.DEVICE)
    elif inputs.options["is_causal"]:
        options["block_mask"] = create_block_mask(lambda b, h, i, j: i >= j, None, None, s, s, device=gpu.DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(inputs.q, inputs.k, inputs.v, **options)


def check(inputs: Inputs, output: torch.Tensor) -> Gate:
    """Not further from the float64 truth than twice torch's own of the same dtype, plus a rounding: in some heads."""
    group = inputs.q.shape[1] // inputs.k.shape[1]
    own, theirs = slice(0, CHECKED_HEADS * group), slice(0, CHECKED_HEADS)
    last = slice(max(0, inputs.q.shape[2] - CHECKED_QUERIES), None)
    q, k, v = inputs.q[:1, own, last], inputs.k[:1, theirs], inputs.v[:1, theirs]
    mask = inputs.options.get("attn_mask")
    if inputs.options["is_causal"]:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=gpu.DEVICE).tril(k.shape[2] - q.shape[2])
    elif mask is not None:
        mask = mask[..., last, :] if mask.ndim == 2 else mask[:1, own, last]
    wide = mask if mask is None or mask.dtype is torch.bool else mask.double()
    truth = reference(q.double(), k.double(), v.double(), attn_mask=wide, enable_gqa=group > 1)
    with sdpa_kernel(SDPBackend.MATH):
        eager = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=group > 1)
    limit = 2 * relative_error(eager, truth) + torch.finfo(torch.bfloat16).eps
    return Gate.judge(relative_error(output[:1, own, last], truth), limit, "relative error against the reference")
