"""attention_backward on a GPU or in Triton's interpreter: the cases of tests/cases.py, and what holds beside them."""

import math

import pytest
import torch
from cases import SUITES
from compiled_cases import meta
from interpreter_repairs import repair
from tolerances import assert_composite, assert_exact, eps
from torch.utils._pytree import tree_leaves, tree_map_only

from lamina.ops import attention
from lamina.reference.attention import attention as reference
from lamina.reference.attention_backward import attention_backward as reference_backward

repair()
ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities and NaN in the interpreter
SUITE = SUITES["attention_backward"]
# The interpreter takes seconds for what has many blocks; float64 is not the kernels'.
CASES = [case for case in SUITE.cases if case.id != "f64" and (ON_GPU or not {"threads"} & case.tags)]


def inputs(batch, heads, kv_heads, queries, keys, size, dtype=torch.float32):
    """query, key, value and the gradient of the output, on the CPU."""
    sizes = (heads, queries), (kv_heads, keys), (kv_heads, keys), (heads, queries)
    return tuple(torch.randn(batch, *shape, size).to(dtype) for shape in sizes)


def gradients(device, tensors, grad_out, grad_lse=None, **options):
    """Of query, key, value and the floating-point options, in this order."""
    leaves = [t.detach().to(device).requires_grad_() for t in tensors]
    extra = {
        name: x.detach().to(device).requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x
        for name, x in options.items()
    }
    out, lse = attention(*leaves, return_lse=True, enable_gqa=True, **extra)
    wanted = [*leaves, *(x for x in extra.values() if isinstance(x, torch.Tensor) and x.requires_grad)]
    outputs, grads = [out], [grad_out.to(device)]
    if grad_lse is not None:
        outputs, grads = [out, lse], [*grads, grad_lse.to(device)]
    return [g.cpu() for g in torch.autograd.grad(outputs, wanted, grads)]


def assert_gradients(device, query, key, value, grad_out, grad_lse=None, **options):
    got = gradients(device, (query, key, value), grad_out, grad_lse, **options)

    def backward(dtype):
        cast = {
            name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in options.items()
        }
        tensors = (t.to(dtype) for t in (grad_out, query, key, value))
        return reference_backward(*tensors, grad_lse=None if grad_lse is None else grad_lse.to(dtype), **cast)

    # Terms are rounded like dP, a product over the value size, and to the dtype before they are multiplied.
    largest = (grad_out.double().norm(dim=-1).amax() * value.double().norm(dim=-1).amax()).item()
    for actual, eager, truth in zip(got, backward(torch.float32), backward(torch.float64), strict=True):
        distance = query.shape[-2] + key.shape[-2] if actual.ndim == 1 else 1  # the factor in a slope's terms
        floor = 8 * distance * eps(torch.float32) * largest + 2 * eps(actual.dtype) * truth.abs().max().item()
        if query.dtype.itemsize == 2:
            floor += eps(query.dtype) * largest / 2
        assert_composite(actual, eager.to(actual.dtype), truth, floor=floor)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_float64(device, case, seed):
    given = case.inputs(seed)
    moved = tree_map_only(torch.Tensor, lambda t: t.to(device), given)
    SUITE.check(tuple(t.cpu() for t in torch.ops.lamina.attention_backward(*moved)), given)


FEATURES = {
    "causal": {"is_causal": True},
    "causal_bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"window": (20, 9), "causal_alignment": "bottom_right"},
    "softcap": {"softcap": 2.0, "window": (40, None)},
    "negative_scale": {"scale": -0.3},
    "no_scale": {"scale": 0.0, "is_causal": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FEATURES)
def test_features(device, name, dtype):
    assert_gradients(device, *inputs(1, 2, 1, 50, 70, 16, dtype=dtype), **FEATURES[name])


def test_slopes_sinks_and_the_log_sum_exp(device):
    tensors = inputs(2, 4, 2, 40, 50, 16)
    assert_gradients(device, *tensors, torch.randn(2, 4, 40), sinks=torch.randn(4), is_causal=True)
    assert_gradients(device, *tensors, alibi_slopes=torch.rand(4) / 8, is_causal=True)
    assert_gradients(device, *tensors, alibi_slopes=torch.rand(2, 4) / 8, softcap=3.0)


@pytest.mark.parametrize("shape", [(2, 4, 40, 50), (1, 4, 40, 50), (40, 50), (4, 1, 50), (2, 4, 40, 1), (1, 1), (50,)])
def test_the_gradient_of_a_mask_is_summed_over_what_it_broadcasts(device, shape):
    # With a sink, or a mask of queries would have no gradient at all: softmax does not see what all scores share.
    assert_gradients(device, *inputs(2, 4, 2, 40, 50, 16), attn_mask=torch.randn(shape), sinks=torch.randn(4))


@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_the_blocks_of_a_shared_mask_are_sorted(device, kind):
    size = 1100 if ON_GPU else 100
    keep = torch.rand(1, 1, size, size) < 0.6
    keep[:, :, : size // 2, size // 2 :] = False
    keep[:, :, size // 2 :, : size // 2] = True
    keep[:, :, 5] = False
    mask = keep if kind == "boolean" else torch.zeros(keep.shape).masked_fill(~keep, -math.inf)
    assert_gradients(device, *inputs(1, 2, 1, size, size, 16), attn_mask=mask, window=(60, 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_excluded_keys_do_not_leak(device, bad, dtype):
    q, k, v, grad = inputs(1, 2, 2, 70, 100, 16, dtype=dtype)
    keep = torch.rand(70, 100) < 0.5
    keep[:, 60:], keep[:, 0] = False, True
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[:, :, 60:], bad_v[:, :, 60:] = bad, bad
    for options in ({"attn_mask": keep}, {"attn_mask": torch.zeros(70, 100).masked_fill(~keep, -math.inf)}):
        clean = gradients(device, (q, k, v), grad, **options)
        for dirty, expected in zip(gradients(device, (q, bad_k, bad_v), grad, **options), clean, strict=True):
            assert dirty.isfinite().all()
            torch.testing.assert_close(dirty, expected)


def test_a_query_that_is_not_a_number_reaches_its_keys_alone(device):
    q, k, v, grad = inputs(1, 2, 2, 70, 100, 16)
    grad[:, :, 50] = math.nan
    dq, dk, dv = gradients(device, (q, k, v), grad, window=(3, 3))
    assert dq[:, :, 50].isnan().all()
    assert dq[:, :, [*range(50), *range(51, 70)]].isfinite().all()
    for t in (dk, dv):
        assert t[:, :, 47:54].isnan().all()
        assert t[:, :, [*range(47), *range(54, 100)]].isfinite().all()


def test_a_query_without_keys_has_no_gradient(device):
    q, k, v, grad = inputs(1, 2, 2, 40, 50, 16)
    keep = torch.rand(40, 50) < 0.5
    keep[3], keep[:, 7] = False, False
    dq, dk, dv = gradients(device, (q, k, v), grad, torch.randn(1, 2, 40), attn_mask=keep)
    assert not dq[:, :, 3].any()
    assert not dk[:, :, 7].any()
    assert not dv[:, :, 7].any()
    assert all(t.isfinite().all() for t in (dq, dk, dv))


@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_dropout_is_the_documented_function_of_the_seed(device, dropout_p):
    q, k, v, grad = inputs(2, 4, 2, 40, 60, 16)
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, ())
    torch.manual_seed(5)
    got = gradients(device, (q, k, v), grad, dropout_p=dropout_p, is_causal=True)
    doubles = (t.double() for t in (grad, q, k, v))
    truth = reference_backward(*doubles, dropout_p=dropout_p, is_causal=True, seed=seed)
    for actual, right in zip(got, truth, strict=True):
        assert (actual - right).abs().max() <= 1e-5 * max(1.0, right.abs().max().item())


def test_the_same_inputs_give_the_same_bits(device):
    q, k, v, grad = inputs(2, 4, 2, 70, 90, 16, dtype=torch.bfloat16)
    options = {"attn_mask": torch.randn(90), "sinks": torch.randn(4), "alibi_slopes": torch.rand(4)}
    first = gradients(device, (q, k, v), grad, **options)
    assert_exact(gradients(device, (q, k, v), grad, **options), first)


def test_a_gradient_may_reach_the_log_sum_exp_alone(device):
    q, k, v, _ = inputs(1, 2, 2, 40, 60, 16)
    leaves = [t.clone().to(device).requires_grad_() for t in (q, k, v)]
    got = torch.autograd.grad(attention(*leaves, return_lse=True)[1].square().sum(), leaves)
    doubles = [t.double().requires_grad_() for t in (q, k, v)]
    truth = torch.autograd.grad(reference(*doubles, return_lse=True)[1].square().sum(), doubles, allow_unused=True)
    for actual, right in zip(got[:2], truth[:2], strict=True):
        assert (actual.cpu() - right).abs().max() <= 8 * eps(torch.float32) * right.abs().max()
    assert not got[2].any()


def test_gradients_are_the_differences_of_the_function(device):
    """Along a direction; the values come from float32, so a wide step."""
    tensors = [t.to(device) for t in inputs(1, 2, 1, 20, 24, 16)[:3]]
    mask = torch.randn(20, 24, device=device)
    leaves = [t.clone().requires_grad_() for t in (*tensors, mask)]

    def value(*leaves):
        out = attention(*leaves[:3], leaves[3], is_causal=True, enable_gqa=True, softcap=3.0, return_lse=True)
        return sum(t.double().square().mean() for t in out)

    steps = [torch.randn_like(t) for t in leaves]
    slope = sum((g * s).sum() for g, s in zip(torch.autograd.grad(value(*leaves), leaves), steps, strict=True))
    ahead, behind = (value(*(t.detach() + h * s for t, s in zip(leaves, steps, strict=True))) for h in (1e-2, -1e-2))
    assert abs((ahead - behind).item() / 2e-2 - slope.item()) <= 2e-3 * max(1.0, abs(slope.item()))


def test_zero_sizes(device):
    for queries, keys in ((0, 5), (5, 0)):
        q, k, v, grad = inputs(1, 2, 2, queries, keys, 16)
        assert not any(t.any() for t in tree_leaves(gradients(device, (q, k, v), grad)))


def _compiled(size, dtype=torch.bfloat16, mask=None, **options):
    def launch():
        from lamina.kernels.attention_backward import attention_backward as kernels

        q, lse = meta(2, 8, 2048, size, dtype=dtype), meta(2, 8, 2048)
        there = None if mask is None else meta(*mask[0], dtype=mask[1])
        kernels(q, q, q, q, q, lse, None, there, q, q, q, scale=0.1, **options)

    return launch


COMPILED = [
    *(_compiled(size, is_causal=True) for size in (64, 128, 256)),
    _compiled(64, torch.float32, is_causal=True),
    _compiled(128, mask=((2, 1, 2048, 2048), torch.bool)),
    _compiled(64, mask=((1, 8, 2048, 2048), torch.float32), mask_gradient=True),
    _compiled(64, dropout_p=0.1, seed=torch.tensor(3)),
]
