"""attention_backward: against float64 autograd on every ISA, and the properties that hold without a tolerance."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_composite, assert_exact

from lamina import _C
from lamina.ops.attention import attention
from lamina.ops.attention_backward import attention_backward
from lamina.reference.attention import attention as reference
from lamina.reference.attention import dropout_mask, kept_share
from lamina.reference.attention_backward import attention_backward as reference_backward

DTYPES = [torch.float32, torch.bfloat16]
# Around the vector widths (4, 8, 16), the row block (64), the chunk of keys (96) and its strips of 6.
LENGTHS = [1, 2, 3, 7, 16, 17, 63, 64, 65, 95, 96, 97, 130, 200]
HEAD_SIZES = [1, 3, 16, 17, 40, 64, 72, 128, 256]


@pytest.fixture(autouse=True)
def on_its_isa(request, as_found):
    if "isa" in request.fixturenames:
        _C.force_isa(request.getfixturevalue("isa"))


def inputs(batch, heads, kv_heads, queries, keys, size, value_size=None, dtype=torch.float32, generator=None):
    """query, key, value and the gradient of the output."""
    dv = value_size or size
    shapes = ((heads, queries, size), (kv_heads, keys, size), (kv_heads, keys, dv), (heads, queries, dv))
    return tuple(torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes)


def gradients(function, tensors, grad_out, **options):
    """Of query, key, value and of every option that requires one."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    extra = {
        k: v.detach().clone().requires_grad_()
        for k, v in options.items()
        if isinstance(v, torch.Tensor) and v.is_floating_point()
    }
    out = function(*leaves, **(options | extra))
    return torch.autograd.grad(out, [*leaves, *extra.values()], grad_out)


def assert_gradients(query, key, value, grad_out, **options):
    """No further from float64 than twice the same in plain PyTorch, which for plain calls is its fused kernel."""
    options |= {"enable_gqa": query.ndim > 2 and query.shape[-3] != key.shape[-3]}
    tensors = query, key, value
    doubled = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()
    }
    truth = gradients(reference, [t.double() for t in tensors], grad_out.double(), **doubled)
    actual = gradients(attention, tensors, grad_out, **options)
    plain = not {"window", "softcap", "alibi_slopes", "sinks", "causal_alignment"} & set(options)
    plain = plain and not (options.get("is_causal") and "attn_mask" in options) and not options["enable_gqa"]
    eager = gradients(F.scaled_dot_product_attention if plain else reference, tensors, grad_out, **options)
    # A sum may cancel, and the yardstick be exact by luck: eight roundings of a large term, of which those of slopes
    # grow with the distance, one to the dtype, and one of the forward's output are always fair.
    largest = (grad_out.double().norm(dim=-1).amax() * value.double().norm(dim=-1).amax()).item()
    names = ["query", "key", "value", *(k for k, v in doubled.items() if getattr(v, "dtype", None) is torch.float64)]
    for name, got, other, right in zip(names, actual, eager, truth, strict=True):
        terms = query.shape[-2] + key.shape[-2] if name == "alibi_slopes" else 1
        roundings = 8 * terms * torch.finfo(torch.float32).eps * largest
        floor = roundings + torch.finfo(got.dtype).eps * right.abs().max().item()
        if got.dtype is not query.dtype:
            floor += torch.finfo(query.dtype).eps / 2 * largest
        assert_composite(got, other, right, floor=floor, what=name)


# -- against float64


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 1, 3]),
    queries=st.sampled_from(LENGTHS),
    keys=st.sampled_from(LENGTHS),
    size=st.sampled_from(HEAD_SIZES),
    value_size=st.sampled_from([None, None, 1, 33, 64]),
    dtype=st.sampled_from(DTYPES),
    mask=st.sampled_from([None, None, "boolean", "boolean_keys", "added", "added_keys"]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "is_causal": st.just(True),
            "window": st.sampled_from([(5, 2), (40, -1), (-1, 10)]),
            "softcap": st.just(3.0),
            "causal_alignment": st.just("bottom_right"),
            "sinks": st.just("sinks"),
            "alibi_slopes": st.just("slopes"),
        },
    ),
    layout=st.sampled_from(["heads first", "tokens first", "columns apart"]),
    seed=st.integers(0, 2**16),
)
def test_gradients_match_the_reference(
    isa, batch, kv_heads, group, queries, keys, size, value_size, dtype, mask, options, layout, seed
):
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads * group
    tensors = inputs(batch, heads, kv_heads, queries, keys, size, value_size, dtype, generator)
    if layout == "tokens first":
        tensors = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors)
    if layout == "columns apart":
        tensors = tuple(t.mT.contiguous().mT for t in tensors)
    if mask:
        shape = (batch, 1, 1, keys) if mask.endswith("keys") else (batch, heads, queries, keys)
        kept = torch.rand(shape, generator=generator) < 0.7
        added = torch.randn(shape, generator=generator).masked_fill(~kept, -math.inf).to(dtype)
        options = options | {"attn_mask": kept if mask.startswith("boolean") else added}
    if "sinks" in options:
        options = options | {"sinks": torch.randn(heads, generator=generator)}
    if "alibi_slopes" in options:
        options = options | {"alibi_slopes": torch.rand(heads, generator=generator) / 8}
    _C.poison_workspace(True)  # a read of scratch memory that nobody wrote gives NaN
    assert_gradients(*tensors, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "queries", "keys"), [(1, 70, 2000), (3, 500, 1000), (1, 1, 5000)])
def test_gradients_of_few_heads_over_ranges_of_keys(heads, queries, keys, dtype):
    for options in ({}, {"is_causal": True, "causal_alignment": "bottom_right"}, {"window": (100, 100)}):
        assert_gradients(*inputs(1, heads, 1, queries, keys, 32, dtype=dtype), **options)


def test_gradients_in_float64_pass_gradcheck():
    q, k, v, _ = inputs(2, 4, 2, 5, 7, 3, 2, torch.float64)
    mask = torch.randn(1, 4, 5, 7, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (q, k, v, mask, torch.rand(4).double(), torch.randn(4).double())]

    def call(q, k, v, mask, slopes, sinks, **options):
        return attention(
            q, k, v, mask, enable_gqa=True, alibi_slopes=slopes, sinks=sinks, softcap=2.0, return_lse=True, **options
        )

    for options in ({}, {"is_causal": True, "causal_alignment": "bottom_right"}, {"window": (2, 1)}):
        assert torch.autograd.gradcheck(lambda *t, options=options: call(*t, **options), tensors)

    def dropped(*t):
        torch.manual_seed(3)
        return call(*t, dropout_p=0.4)

    assert torch.autograd.gradcheck(dropped, tensors)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_a_gradient_may_reach_the_log_sum_exp_alone(isa, dtype):
    q, k, v, _ = inputs(1, 2, 2, 40, 60, 16, dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    lse = attention(*leaves, return_lse=True)[1]
    got = torch.autograd.grad(lse.square().sum(), leaves)
    doubles = [t.double().requires_grad_() for t in (q, k, v)]
    truth = torch.autograd.grad(reference(*doubles, return_lse=True)[1].square().sum(), doubles, allow_unused=True)
    for actual, right in zip(got[:2], truth[:2], strict=True):
        error = (actual.double() - right).abs().max() / right.abs().max()
        assert error <= 4 * max(torch.finfo(dtype).eps, 2 * torch.finfo(torch.float32).eps)
    assert not got[2].any()


# -- masks


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 70, 90), (1, 4, 70, 90), (2, 1, 70, 90), (70, 90), (4, 1, 90), (2, 4, 70, 1), (1, 1), (90,)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_mask_is_summed_over_what_it_broadcasts(isa, shape, dtype):
    tensors = inputs(2, 4, 2, 70, 90, 16, dtype=dtype)
    # With a sink, or a mask of queries would have no gradient at all: softmax does not see what all scores share.
    assert_gradients(*tensors, attn_mask=torch.randn(shape).to(dtype), sinks=torch.randn(4))


def test_a_mask_may_have_any_strides(isa):
    q, k, v, grad = inputs(2, 2, 2, 20, 30, 16)
    mask = torch.randn(2, 1, 30, 20)
    assert_gradients(q, k, v, grad, attn_mask=mask.mT)
    assert_gradients(q, k, v, grad, attn_mask=torch.randn(20, 60)[:, ::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_without_keys_has_no_gradient(isa, dtype):
    q, k, v, grad = inputs(1, 2, 2, 70, 90, 32, dtype=dtype)
    keep = torch.rand(70, 90) < 0.5
    keep[3] = False
    keep[:, 7] = False
    for mask in (keep, torch.zeros(70, 90, dtype=dtype).masked_fill(~keep, -math.inf)):
        dq, dk, dv, *_ = gradients(attention, (q, k, v), grad, attn_mask=mask)
        assert not dq[:, :, 3].any()
        assert not dk[:, :, 7].any()
        assert not dv[:, :, 7].any()
        assert all(t.isfinite().all() for t in (dq, dk, dv))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_excluded_keys_do_not_leak(isa, bad, dtype):
    q, k, v, grad = inputs(1, 2, 2, 70, 100, 32, dtype=dtype)
    keep = torch.rand(70, 100) < 0.5
    keep[:, 60:] = False
    keep[:, 0] = True
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[:, :, 60:], bad_v[:, :, 60:] = bad, bad
    added = torch.zeros(70, 100, dtype=dtype).masked_fill(~keep, -math.inf)
    for options in ({"attn_mask": keep}, {"attn_mask": added.requires_grad_()}):
        clean = gradients(attention, (q, k, v), grad, **options)
        for dirty, expected in zip(gradients(attention, (q, bad_k, bad_v), grad, **options), clean, strict=True):
            assert dirty.isfinite().all()
            torch.testing.assert_close(dirty, expected)
    # A later query's NaN does not reach what earlier ones give to keys it may not see.
    bad_grad = grad.clone()
    bad_grad[:, :, 50] = math.nan
    dq, dk, dv = gradients(attention, (q, k, v), bad_grad, window=(3, 3))
    assert dq[:, :, 50].isnan().all()
    assert dq[:, :, [*range(50), *range(51, 70)]].isfinite().all()
    for t in (dk, dv):
        assert t[:, :, 47:54].isnan().all()
        assert t[:, :, [*range(47), *range(54, 100)]].isfinite().all()


# -- dropout


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_dropout_is_the_documented_function_of_the_seed(isa, dtype):
    q, k, v, grad = inputs(2, 4, 2, 70, 90, 16, dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, ())
    torch.manual_seed(5)
    out, lse = attention(*leaves, dropout_p=0.3, is_causal=True, enable_gqa=True, return_lse=True)
    got = torch.autograd.grad(out, leaves, grad)
    doubles = [t.double() for t in (q, k, v)]
    options = {"dropout_p": 0.3, "is_causal": True, "seed": seed}
    truth = reference_backward(grad.double(), *doubles, **options)
    expected, expected_lse = reference(*doubles, enable_gqa=True, return_lse=True, **options)
    # A weight dropped on one side only would be off by whole units.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for actual, right in zip((out, lse, *got), (expected, expected_lse, *truth), strict=True):
        assert (actual.double() - right).abs().max() <= tolerance * right.abs().max()


def test_dropout_keeps_the_share_it_should():
    for p in (0.1, 0.5, 0.9):
        kept = dropout_mask(7, (2, 3, 130, 257), p)
        assert abs(kept.double().mean().item() - kept_share(p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
        # Neighbours in no direction hang together.
        for dim in range(4):
            pairs = kept.narrow(dim, 0, kept.shape[dim] - 1) & kept.narrow(dim, 1, kept.shape[dim] - 1)
            spread = 5 * (kept_share(p) ** 2 / pairs.numel()) ** 0.5
            assert abs(pairs.double().mean().item() - kept_share(p) ** 2) < spread


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_the_same_on_every_isa_and_for_every_number_of_threads(dtype):
    """v = 1 and equal scores make an output the number of kept weights."""
    q, k, v, _ = inputs(2, 4, 2, 37, 90, 8, dtype=dtype)
    options = {"dropout_p": 0.5, "enable_gqa": True}
    counts = []
    threads = torch.get_num_threads()
    for isa in _C.available_isas():
        _C.force_isa(isa)
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(11)
            counts.append(attention(torch.zeros_like(q), k, torch.ones_like(v), **options))
    torch.set_num_threads(threads)
    for other in counts[1:]:
        torch.testing.assert_close(other, counts[0])
    assert counts[0].unique().numel() > 10


def test_dropout_follows_the_seed_of_torch():
    q, k, v, _ = inputs(1, 2, 2, 20, 30, 8)
    torch.manual_seed(1)
    first, second = attention(q, k, v, dropout_p=0.5), attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert_exact(attention(q, k, v, dropout_p=0.5), first)
    assert_exact(attention(q, k, v, dropout_p=0.5), second)
    assert not attention(q, k, v, dropout_p=1.0).any()
    leaf = v.clone().requires_grad_()
    assert not torch.autograd.grad(attention(q, k, leaf, dropout_p=1.0).sum(), leaf)[0].any()
    with pytest.raises(ValueError, match=r"^attention: dropout_p is 1.5, but must be between 0 and 1$"):
        attention(q, k, v, dropout_p=1.5)


# -- autograd


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_the_same_bits_for_every_number_of_threads(dtype):
    tensors = inputs(2, 2, 1, 200, 900, 32, dtype=dtype)
    mask = torch.randn(1, 1, 200, 900).to(dtype)
    threads = torch.get_num_threads()
    try:
        for options in (
            {},
            {"is_causal": True},
            {"attn_mask": mask},
            {"sinks": torch.randn(2), "alibi_slopes": torch.rand(2)},
        ):
            torch.set_num_threads(1)
            one = gradients(attention, tensors[:3], tensors[3], enable_gqa=True, **options)
            for count in (2, 3):
                torch.set_num_threads(count)
                assert_exact(gradients(attention, tensors[:3], tensors[3], enable_gqa=True, **options), one)
    finally:
        torch.set_num_threads(threads)


def test_gradients_broadcast_like_the_forward():
    tensors = torch.randn(3, 2, 9, 16), torch.randn(1, 2, 12, 16), torch.randn(2, 12, 16)
    assert_gradients(*tensors, torch.ones(()).expand(3, 2, 9, 16), attn_mask=torch.randn(3, 1, 9, 12))
    assert_gradients(*(torch.randn(2, 3, 2, 5, 8) for _ in range(4)), is_causal=True)
    assert_gradients(*(torch.randn(5, 8) for _ in range(4)))


def test_only_what_is_asked_has_a_gradient():
    q, k, v, _ = inputs(1, 2, 2, 5, 6, 8)
    leaf = v.clone().requires_grad_()
    out = attention(q, k, leaf)
    assert out.requires_grad
    out.sum().backward()
    assert leaf.grad is not None
    with torch.no_grad():
        assert not attention(q, k, leaf).requires_grad


def test_second_derivatives_are_refused():
    q, k, v, _ = inputs(1, 2, 2, 5, 6, 8)
    leaf = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(attention(leaf, k, v).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_gradients_under_autocast():
    q, k, v, grad = inputs(1, 2, 2, 20, 30, 16)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    with torch.autocast("cpu"):
        out = attention(*leaves)
    assert out.dtype is torch.bfloat16
    halves = gradients(attention, [t.bfloat16() for t in (q, k, v)], grad.bfloat16())
    for got, expected in zip(torch.autograd.grad(out, leaves, grad.bfloat16()), halves, strict=True):
        assert_exact(got, expected.float())


def test_gradients_in_a_compiled_graph():
    tensors = inputs(1, 4, 2, 40, 50, 16)
    mask, sinks = torch.randn(40, 50), torch.randn(4)
    for options in ({}, {"attn_mask": mask, "sinks": sinks, "softcap": 5.0}):

        def call(q, k, v, grad, options=options):
            return gradients(attention, (q, k, v), grad, is_causal=True, enable_gqa=True, **options)

        def loss(q, k, v, grad, options=options):
            return (attention(q, k, v, is_causal=True, enable_gqa=True, **options) * grad).sum()

        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        leaves = [t.clone().requires_grad_() for t in tensors[:3]]
        got = torch.autograd.grad(compiled(*leaves, tensors[3]), leaves)
        assert_exact(got, call(*tensors)[:3])
    torch._dynamo.reset()
    dropping = torch.compile(lambda q, k, v: attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in inputs(1, 2, 2, 40, 50, 16)[:3]]
    first, second = dropping(*leaves), dropping(*leaves)
    assert not torch.equal(first, second), "the seed was burnt into the graph"
    assert all(t.isfinite().all() for t in torch.autograd.grad(first.sum(), leaves))


def test_gradients_under_vmap():
    q, k, v, grad = inputs(3, 2, 2, 9, 12, 8)
    stacked = torch.vmap(lambda q, k, v: attention(q[None], k[None], v[None], is_causal=True)[0])(q, k, v)
    torch.testing.assert_close(stacked, attention(q, k, v, is_causal=True))

    def loss(q, k, v, grad):
        return (attention(q[None], k[None], v[None], is_causal=True)[0] * grad).sum()

    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v, grad)
    for actual, expected in zip(got, gradients(attention, (q, k, v), grad, is_causal=True), strict=True):
        torch.testing.assert_close(actual, expected)


# -- the op itself


def test_the_function_gives_what_autograd_gives():
    q, k, v, grad = inputs(1, 2, 2, 20, 30, 16)
    mask, sinks = torch.randn(20, 30), torch.randn(2)
    out, lse = attention(q, k, v, mask, sinks=sinks, window=(10, 4), return_lse=True)
    got = attention_backward(grad, q, k, v, out, lse, mask, sinks=sinks, window=(10, 4))
    expected = gradients(attention, (q, k, v), grad, attn_mask=mask, sinks=sinks, window=(10, 4))
    assert got.alibi_slopes is None
    assert_exact([*got[:4], got.sinks], expected)


def test_bad_inputs_are_refused_in_one_sentence():
    q, k, v, grad = inputs(1, 2, 2, 5, 6, 8)
    out, lse = attention(q, k, v, return_lse=True)
    with pytest.raises(ValueError, match=r"^attention_backward: lse is float64, but must be float32$"):
        attention_backward(grad, q, k, v, out, lse.double())
    with pytest.raises(ValueError, match=r"^attention_backward: grad_out is bfloat16, but must be float32$"):
        attention_backward(grad.bfloat16(), q, k, v, out, lse)
    with pytest.raises(ValueError, match=r"^attention_backward: grad_out is float32\[1, 2, 4, 8\], but must be"):
        attention_backward(grad[:, :, :4], q, k, v, out, lse)
    with pytest.raises(ValueError, match=r"^attention_backward: attn_mask is float32\[5, 7\], but must broadcast to"):
        attention_backward(grad, q, k, v, out, lse, torch.zeros(5, 7))
    with pytest.raises(ValueError, match=r"must have 2, 3 or 4 dimensions$"):
        attention_backward(grad[None], q[None], k[None], v[None], out[None], lse)
