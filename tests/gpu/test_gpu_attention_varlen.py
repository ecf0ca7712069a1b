"""attention_varlen on a GPU or in Triton's interpreter: the cases of tests/cases.py, and what holds beside them."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import SUITES, attention_varlen_truth
from compiled_cases import meta
from interpreter_repairs import repair
from tolerances import assert_composite, assert_exact, eps
from torch.utils._pytree import tree_map_only

from lamina.ops import attention, attention_varlen
from lamina.reference.attention_varlen import attention_varlen as reference

repair()
ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities and NaN in the interpreter
SUITE = SUITES["attention_varlen"]
CASES = [case for case in SUITE.cases if ON_GPU or not {"threads"} & case.tags]
LENGTHS = (37, 0, 1, 50)


def inputs(lengths=LENGTHS, heads=4, kv_heads=2, size=16, dtype=torch.float32):
    """q [total, H, D], k and v [total, Hkv, D], and the arguments of their lengths."""
    ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    q, k, v = (torch.randn(sum(lengths), n, size).to(dtype) for n in (heads, kv_heads, kv_heads))
    return q, k, v, ends, ends, max(lengths), max(lengths)


def on(device, given):
    return tree_map_only(torch.Tensor, lambda t: t.to(device), given)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_float64(device, case, seed):
    given = case.inputs(seed)
    out = torch.ops.lamina.attention_varlen(*on(device, given)).cpu()
    value = given[2]
    largest = value.abs().max().item() if value.numel() else 0.0
    # As in test_gpu_attention.
    floor = (8 * eps(torch.float32) + 2 * (value.dtype.itemsize == 2) * eps(value.dtype)) * largest
    truth = attention_varlen_truth(*given)
    assert_composite(out, truth.to(out.dtype), truth, floor=floor)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (9, 0)}, {"softcap": 4.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_sequence_is_a_call_of_attention(device, dtype, options):
    q, k, v, ends, *rest = on(device, inputs(dtype=dtype))
    out, lse = attention_varlen(q, k, v, ends, *rest, return_lse=True, **options)
    assert_exact(attention_varlen(q, k, v, ends, *rest, **options), out)
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        part = [t[begin:end].transpose(0, 1)[None] for t in (q, k, v)]
        expected, its_lse = attention(*part, enable_gqa=True, return_lse=True, **options)
        assert_exact(out[begin:end], expected[0].transpose(0, 1))
        assert_exact(lse[:, begin:end], its_lse[0])


def test_other_sequences_do_not_leak(device):
    q, k, v, *rest = inputs()
    weight = torch.randn_like(q)

    def run(q, k, v, weight):
        leaves = [t.to(device).requires_grad_() for t in (q, k, v)]
        out = attention_varlen(*leaves, *on(device, rest), is_causal=True)
        return [t.detach().cpu() for t in (out, *torch.autograd.grad(out, leaves, weight.to(device)))]

    clean = run(q, k, v, weight)
    q, k, v, weight = q.clone(), k.clone(), v.clone(), weight.clone()
    k[37:], v[37:], q[37:], weight[37:] = math.nan, math.inf, math.nan, math.nan
    for dirty, expected in zip(run(q, k, v, weight), clean, strict=True):
        torch.testing.assert_close(dirty[:37], expected[:37])


def test_lengths_of_64_bits_and_longer_than_the_longest(device):
    q, k, v, ends, _, *longest = on(device, inputs())
    expected = attention_varlen(q, k, v, ends, ends, *longest)
    assert_exact(attention_varlen(q, k, v, ends.long(), ends, *longest), expected)
    assert_exact(attention_varlen(q, k, v, ends, ends, 100, 200), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extras", [False, True])
def test_gradients(device, extras, dtype):
    q, k, v, *rest = inputs((9, 0, 40), dtype=dtype)
    options = {"is_causal": True, "window": (-1, -1)}
    if extras:
        options |= {"window": (12, -1), "softcap": 3.0, "alibi_slopes": torch.rand(3, 4) / 8, "sinks": torch.randn(4)}
    weight, lse_weight = torch.randn(49, 4, 16), torch.randn(4, 49)
    names = [name for name, x in options.items() if isinstance(x, torch.Tensor)]

    def run(function, dtype, where, **more):
        # Slopes and sinks are float32, whatever the inputs are.
        floats = torch.promote_types(dtype, torch.float32)
        leaves = [t.to(where, dtype).requires_grad_() for t in (q, k, v)]
        extra = {name: options[name].to(where, floats).requires_grad_() for name in names}
        out, lse = function(*leaves, *on(where, rest if more else rest[:2]), **{**options, **extra}, **more)
        # Sums of no keys are not differentiated: there are none here.
        total = (out.to(floats) * weight.to(where, floats)).sum() + (lse * lse_weight.to(where, floats)).sum()
        return [g.cpu() for g in torch.autograd.grad(total, [*leaves, *extra.values()])]

    ours = run(attention_varlen, dtype, device, return_lse=True)
    eager, truths = run(reference, torch.float32, "cpu"), run(reference, torch.float64, "cpu")
    for actual, other, truth in zip(ours, eager, truths, strict=True):
        floor = (32 * eps(torch.float32) + 4 * (dtype.itemsize == 2) * eps(dtype)) * max(1, truth.abs().max().item())
        assert_composite(actual, other.to(actual.dtype), truth, floor=floor)


def test_what_is_refused(device):
    q, k, v, ends, _, *longest = on(device, inputs())
    for arguments, message in (
        ((q, k, v, ends.float(), ends), "cu_seqlens_q is float32, but must be int32 or int64"),
        ((q, k, v, ends, ends[:2]), r"cu_seqlens_k has shape \[2\], but must be \[5\]"),
        ((q, k[..., :8], v, ends, ends), r"key has shape \[1, 2, 88, 8\], but must be \[1, \*, \*, 16\]"),
        ((q[:, :3], k, v, ends, ends), "query has 3 heads and key has 2, but the first must be a multiple"),
    ):
        with pytest.raises(ValueError, match=f"attention_varlen: {message}"):
            attention_varlen(*arguments, *longest)


def _compiled(size, dtype, backward, **options):
    def launch():
        from lamina.kernels.attention import attention as forward
        from lamina.kernels.attention_backward import attention_backward as gradient

        q = meta(1, 4096, 8, size, dtype=dtype).transpose(1, 2)
        lse, ends = meta(1, 8, 4096), (meta(9, dtype=torch.int32), meta(9, dtype=torch.int32), 1024, 1024)
        options_of_both = {"scale": 0.1, "bottom_right": True, "ends": ends, **options}
        if backward:
            gradient(q, q, q, q, q, lse, None, None, q, q, q, **options_of_both)
        else:
            forward(q, q, q, None, q, lse, **options_of_both)

    return launch


COMPILED = [
    _compiled(64, torch.bfloat16, False, is_causal=True),
    _compiled(128, torch.bfloat16, False, is_causal=True),
    _compiled(64, torch.bfloat16, True, is_causal=True),
]
