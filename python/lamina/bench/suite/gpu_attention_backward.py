"""The backward pass of attention on a GPU against the backends of scaled_dot_product_attention."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import lamina
from lamina.bench.suite.gpu_attention import BACKENDS, CHECKED_HEADS, Inputs, make_inputs, scores_of
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.attention_backward import attention_backward as reference


def workloads() -> Iterator[Workload]:
    """Every line of shapes/gpu_attention_backward.txt."""
    for name, *sizes, mask in read_shapes("gpu_attention_backward", columns=7):
        yield _workload(name, *map(int, sizes), mask)


def _workload(name: str, b: int, h: int, hkv: int, s: int, d: int, mask: str) -> Workload:
    heads = str(h) if h == hkv else f"{h}kv{hkv}"
    shape = f"{b}x{heads}x{s}x{d}" + ("" if mask == "none" else f"-{mask}")

    def inputs_with_gradients() -> Inputs:
        with torch.inference_mode(False):
            made = make_inputs(b, h, hkv, s, d, mask, s)
            leaves = tuple(t.requires_grad_() for t in (made.q, made.k, made.v))
            return replace(made, leaves=(*leaves, torch.randn_like(made.q, requires_grad=False)))

    return Workload(
        id=f"gpu_attention_backward/{name}/{shape}",
        op="gpu_attention_backward",
        shape=shape,
        dims={"B": b, "H": h, "HKV": hkv, "S": s, "D": d},
        make_inputs=inputs_with_gradients,
        run=lambda inputs: _backward(lambda q, k, v: lamina.ops.attention(q, k, v, **inputs.own), inputs),
        baselines={backend: _sdpa(kind) for backend, kind in BACKENDS.items()},
        check=_check,
        flops=lambda inputs: 10 * b * h * scores_of(s, mask) * d,
        bytes=lambda inputs: 2 * b * s * d * (4 * h + 4 * hkv),
        precision=lambda inputs: "bf16",
        tags=frozenset({"op", "gpu", "training", name, mask, "quick"}),
        device="cuda",
    )


def _backward(function: Callable, inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The backward pass alone, of one forward pass that is kept."""
    *leaves, grad = inputs.leaves
    with torch.inference_mode(False), torch.enable_grad():
        out = function(*leaves)

    def call() -> tuple[torch.Tensor, ...]:
        with torch.inference_mode(False):
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return call


def _sdpa(backend: SDPBackend) -> Callable[[Inputs], Callable]:
    def prepare(inputs: Inputs) -> Callable:
        with sdpa_kernel(backend):
            return _backward(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **inputs.options), inputs)

    return prepare


@torch.inference_mode(False)  # which the runner is in
def _check(inputs: Inputs, output: tuple[torch.Tensor, ...]) -> Gate:
    # As forward; heads with the keys they share are the same problem by themselves.
    q, k, v, grad = (t.detach() for t in inputs.leaves)
    group = q.shape[1] // k.shape[1]
    own, theirs = slice(0, CHECKED_HEADS * group), slice(0, CHECKED_HEADS)
    some = q[:1, own], k[:1, theirs], v[:1, theirs]
    truth = reference(grad[:1, own].double(), *(t.double() for t in some), is_causal=inputs.options["is_causal"])
    leaves = [t.clone().requires_grad_() for t in some]
    with torch.enable_grad(), sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        out = F.scaled_dot_product_attention(*leaves, **inputs.options)
        eager = torch.autograd.grad(out, leaves, grad[:1, own])
    ours = output[0][:1, own], output[1][:1, theirs], output[2][:1, theirs]
    worst = max(
        zip(ours, eager, truth, strict=True),
        key=lambda t: relative_error(t[0], t[2]) - 2 * relative_error(t[1], t[2]),
    )
    limit = 2 * relative_error(worst[1], worst[2]) + torch.finfo(torch.bfloat16).eps
    return Gate.judge(relative_error(worst[0], worst[2]), limit, "relative error of the worst gradient")
