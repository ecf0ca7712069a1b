"""attention_varlen on batches of different lengths against scaled_dot_product_attention on the padded batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.attention_varlen import attention_varlen as reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MASKS = ("none", "causal")


@dataclass(frozen=True)
class Inputs:
    """q [total, H, D], k and v [total, Hkv, D], the cumulative lengths [B + 1], and the same padded for torch."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    ends: torch.Tensor
    longest: int
    causal: bool
    padded: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    mask: torch.Tensor

    @property
    def lengths(self) -> list[int]:
        return self.ends.diff().tolist()


def workloads() -> Iterator[Workload]:
    """Every line of shapes/attention_varlen.txt."""
    for model, *sizes, dtype, mask in read_shapes("attention_varlen", columns=9):
        if dtype not in DTYPES or mask not in MASKS:
            raise ValueError(
                f"shapes/attention_varlen.txt has {dtype} {mask}; dtypes: {', '.join(DTYPES)}; masks: "
                f"{', '.join(MASKS)}"
            )
        yield _workload(model, *map(int, sizes), dtype, mask == "causal")


def _workload(
    model: str, batch: int, shortest: int, longest: int, h: int, hkv: int, d: int, dtype: str, causal: bool
) -> Workload:
    heads = str(h) if h == hkv else f"{h}kv{hkv}"
    shape = f"{batch}x{shortest}to{longest}x{heads}x{d}-{dtype}" + ("-causal" if causal else "")

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(batch + longest + h)
        lengths = torch.randint(shortest, longest + 1, (batch,), generator=generator)
        ends = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        total = int(ends[-1])
        q, k, v = (torch.randn(total, n, d, generator=generator).to(DTYPES[dtype]) for n in (h, hkv, hkv))
        most = int(lengths.max())

        def pad(t: torch.Tensor) -> torch.Tensor:
            parts = t.split(lengths.tolist())
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).transpose(1, 2).contiguous()

        mask = (torch.arange(most) < lengths[:, None])[:, None, None]
        if causal:
            mask = mask & torch.ones(most, most, dtype=torch.bool).tril()
        return Inputs(q, k, v, ends, most, causal, (pad(q), pad(k), pad(v)), mask)

    def scores(inputs: Inputs) -> int:
        return sum(n * (n + 1) // 2 if causal else n * n for n in inputs.lengths)

    return Workload(
        id=f"attention_varlen/{model}/{shape}",
        op="attention_varlen",
        shape=shape,
        dims={"B": batch, "H": h, "HKV": hkv, "MAX": longest, "D": d},
        make_inputs=make_inputs,
        run=_lamina,
        baselines={"sdpa padded": _sdpa},
        check=_check,
        flops=lambda inputs: 4 * h * d * scores(inputs),
        bytes=lambda inputs: 2 * (inputs.q.nbytes + inputs.k.nbytes),
        precision=lambda inputs: "bf16" if dtype == "bfloat16" else "float32",
        tags=frozenset({"op", model, dtype} | ({"quick"} if longest <= 64 else set())),
    )


def _lamina(inputs: Inputs):
    i = inputs
    return lambda: lamina.ops.attention_varlen(i.q, i.k, i.v, i.ends, i.ends, i.longest, i.longest, is_causal=i.causal)


def _sdpa(inputs: Inputs):
    q, k, v = inputs.padded
    gqa = q.shape[1] != k.shape[1]
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask, enable_gqa=gqa)


def _check(inputs: Inputs, output: torch.Tensor) -> Gate:
    # STYLE: not further from the float64 truth than twice torch's own kernel of the same dtype, plus one rounding.
    tensors = (t.double() for t in (inputs.q, inputs.k, inputs.v))
    truth, _ = reference(*tensors, inputs.ends, inputs.ends, inputs.causal)
    padded = _sdpa(inputs)().transpose(1, 2)
    eager = torch.cat([row[:n] for row, n in zip(padded, inputs.lengths, strict=True)])
    limit = 2 * relative_error(eager, truth) + torch.finfo(inputs.q.dtype).eps
    return Gate.judge(relative_error(output, truth), limit, "relative error against the reference")
