"""attention_varlen: what must hold beside the cases of tests/cases.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_composite, assert_exact

from lamina.ops import attention, attention_varlen
from lamina.reference.attention_varlen import attention_varlen as reference

LENGTHS = (37, 0, 1, 130)


def inputs(lengths=LENGTHS, heads=4, kv_heads=2, size=32, dtype=torch.float32):
    """q [total, H, D], k and v [total, Hkv, D], and the arguments of their lengths."""
    ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    q, k, v = (torch.randn(sum(lengths), n, size).to(dtype) for n in (heads, kv_heads, kv_heads))
    return q, k, v, ends, ends, max(lengths), max(lengths)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (9, 0)}, {"softcap": 4.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_sequence_is_a_call_of_attention(dtype, options):
    q, k, v, ends, *rest = inputs(dtype=dtype)
    out, lse = attention_varlen(q, k, v, ends, *rest, return_lse=True, **options)
    assert_exact(attention_varlen(q, k, v, ends, *rest, **options), out)
    assert lse.shape == (4, sum(LENGTHS))
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        part = [t[begin:end].transpose(0, 1)[None] for t in (q, k, v)]
        expected, its_lse = attention(*part, enable_gqa=True, return_lse=True, **options)
        assert_exact(out[begin:end], expected[0].transpose(0, 1))
        assert_exact(lse[:, begin:end], its_lse[0])


def test_other_sequences_do_not_leak():
    q, k, v, *rest = inputs()
    clean = attention_varlen(q, k, v, *rest)
    k[:37], v[:37] = math.nan, math.inf
    assert_exact(attention_varlen(q, k, v, *rest)[37:], clean[37:])


def test_lengths_of_64_bits():
    q, k, v, ends, _, *longest = inputs()
    assert_exact(
        attention_varlen(q, k, v, ends.long(), ends, *longest), attention_varlen(q, k, v, ends, ends, *longest)
    )


@pytest.mark.parametrize("extras", [False, True])
def test_gradients(extras):
    q, k, v, *rest = inputs((9, 0, 20))
    tensors = [t.requires_grad_() for t in (q, k, v)]
    options = {"is_causal": True}
    if extras:
        options |= {"window": (6, -1), "softcap": 3.0, "alibi_slopes": torch.rand(4), "sinks": torch.randn(4)}
    weight = torch.randn(29, 4, 32)
    ours = torch.autograd.grad((attention_varlen(*tensors, *rest, **options) * weight).sum(), tensors)
    ends = rest[:2]
    eager = torch.autograd.grad((reference(*tensors, *ends, **_defaults(options))[0] * weight).sum(), tensors)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    truths = torch.autograd.grad((reference(*doubles, *ends, **_defaults(options))[0] * weight).sum(), doubles)
    for actual, other, truth in zip(ours, eager, truths, strict=True):
        assert_composite(actual, other, truth, floor=4e-7 * truth.abs().max().item())


def _defaults(options):
    return options if "window" in options else {**options, "window": (-1, -1)}


def test_gradcheck():
    q, k, v, *rest = inputs((3, 0, 4), 2, 1, 4, torch.float64)
    tensors = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *t: attention_varlen(*t, *rest, is_causal=True), tensors)


REFUSED = {
    "q is [3, 4] and v [168, 2, 32], but both must have three dimensions": {"q": torch.zeros(3, 4)},
    "k has shape [168, 2, 16], but must be [*, *, 32]": {"k": torch.zeros(168, 2, 16)},
    "q has 3 heads and k has 2, but the first must be a multiple of the second": {"q": torch.zeros(168, 3, 32)},
    "cu_seqlens_q is float32, but must be int32 or int64": {"cu_seqlens_q": torch.tensor([0.0, 168.0])},
    "cu_seqlens_q runs from 0 to 100, but must run from 0 to the 168 tokens there are": {
        "cu_seqlens_q": torch.tensor([0, 37, 37, 38, 100])},
    "cu_seqlens_q gives sequence 1 -1 tokens, but it must be 0 to the 140 of max_seqlen": {
        "cu_seqlens_q": torch.tensor([0, 38, 37, 38, 168])},
    "cu_seqlens_k gives sequence 3 130 tokens, but it must be 0 to the 100 of max_seqlen": {"max_seqlen_k": 100},
    "cu_seqlens_k has shape [2], but must be [5]": {"cu_seqlens_k": torch.tensor([0, 168])},
    "sinks has shape [2], but must be [4]": {"sinks": torch.zeros(2)},
    "alibi_slopes has shape [3, 4], but must be [4, 4]": {"alibi_slopes": torch.zeros(3, 4)},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused(message):
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    arguments = dict(zip(names, inputs(), strict=True)) | {"max_seqlen_q": 140} | REFUSED[message]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        attention_varlen(**arguments)
    assert str(error.value) == f"attention_varlen: {message}"
