"""Forward and backward of attention at the shapes of named models, against scaled_dot_product_attention and its."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.attention_backward import attention_backward as reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MASKS = ("none", "causal")


@dataclass(frozen=True)
class Inputs:
    """q: [B, H, S, D], k and v: [B, Hkv, S, D], which require gradients; grad: [B, H, S, D]; and the arguments."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    options: dict


def workloads() -> Iterator[Workload]:
    """Every line of shapes/attention_backward.txt."""
    for model, *sizes, dtype, mask, dropout in read_shapes("attention_backward", columns=9):
        if dtype not in DTYPES or mask not in MASKS:
            raise ValueError(
                f"shapes/attention_backward.txt has {dtype} {mask}; dtypes: {', '.join(DTYPES)}; "
                f"masks: {', '.join(MASKS)}"
            )
        yield _workload(model, *map(int, sizes), dtype, mask, float(dropout))


def _workload(model: str, b: int, h: int, hkv: int, s: int, d: int, dtype: str, mask: str, dropout: float) -> Workload:
    heads = str(h) if h == hkv else f"{h}kv{hkv}"
    shape = f"{b}x{heads}x{s}x{d}-{dtype}" + ("" if mask == "none" else f"-{mask}")
    shape += f"-dropout{round(100 * dropout)}" if dropout else ""  # in percent
    # A causal call needs only the scores on and below the diagonal, and no kernel is credited for computing the others.
    scores = b * h * (s * (s + 1) // 2 if mask == "causal" else s * s)
    width = DTYPES[dtype].itemsize

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(b + h + s + d)

        def tensor(heads: int) -> torch.Tensor:
            return torch.randn(b, heads, s, d, generator=generator).to(DTYPES[dtype])

        options = {"is_causal": mask == "causal", "enable_gqa": h != hkv, "dropout_p": dropout}
        with torch.inference_mode(False):
            q, k, v = (tensor(heads).requires_grad_() for heads in (h, hkv, hkv))
            return Inputs(q, k, v, tensor(h), options)

    return Workload(
        id=f"attention_backward/{model}/{shape}",
        op="attention_backward",
        shape=shape,
        dims={"B": b, "H": h, "HKV": hkv, "S": s, "D": d},
        make_inputs=make_inputs,
        run=lambda inputs: _step(lamina.ops.attention, inputs),
        baselines={"sdpa": lambda inputs: _step(F.scaled_dot_product_attention, inputs)},
        check=_check,
        # Two products forward, five backward.
        flops=lambda inputs: 14 * scores * d,
        bytes=lambda inputs: width * b * s * d * (4 * h + 4 * hkv),
        precision=lambda inputs: "float32" if dtype == "float32" else "bf16",
        tags=frozenset({"op", "training", model, dtype, mask} | ({"quick"} if s <= 512 else set())),
    )


def _step(function: Callable, inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    leaves = inputs.q, inputs.k, inputs.v

    def step() -> tuple[torch.Tensor, ...]:
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(function(*leaves, **inputs.options), leaves, inputs.grad)

    return step


@torch.inference_mode(False)  # which the runner is in
def _check(inputs: Inputs, output: tuple[torch.Tensor, ...]) -> Gate:
    # STYLE: not further from the float64 truth than twice torch's own kernel of the same dtype, plus one rounding.
    # Dropout draws other weights than torch's: there the same step, without it, is judged.
    if inputs.options["dropout_p"]:
        inputs = Inputs(inputs.q, inputs.k, inputs.v, inputs.grad, inputs.options | {"dropout_p": 0.0})
        if not all(gradient.isfinite().all() for gradient in output):
            return Gate.judge(float("nan"), 0.0, "gradients that are not finite")
        output = _step(lamina.ops.attention, inputs)()
    doubles = [t.detach().double() for t in (inputs.grad, inputs.q, inputs.k, inputs.v)]
    truth = reference(*doubles, is_causal=inputs.options["is_causal"])
    eager = _step(F.scaled_dot_product_attention, inputs)()
    worst = max(
        zip(output, eager, truth, strict=True),
        key=lambda t: relative_error(t[0], t[2]) - 2 * relative_error(t[1], t[2]),
    )
    limit = 2 * relative_error(worst[1], worst[2]) + torch.finfo(inputs.q.dtype).eps
    return Gate.judge(relative_error(worst[0], worst[2]), limit, "relative error of the worst gradient")
