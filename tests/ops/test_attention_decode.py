"""attention_decode and append_to_cache_: what must hold beside the cases of tests/cases.py."""

import math

import pytest
import torch
from tolerances import assert_composite, assert_exact

import lamina
from lamina import _C
from lamina.ops import append_to_cache_, attention, attention_decode, quantize_rows
from lamina.reference.attention_decode import attention_decode as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def on_its_isa(request, as_found):
    if "isa" in request.fixturenames:
        _C.force_isa(request.getfixturevalue("isa"))
    _C.poison_workspace(True)


def inputs(batch=2, queries=1, heads=4, kv_heads=2, keys=70, size=32, dtype=torch.float32):
    """q [B, L, H, D] and caches [B, S, Hkv, D]."""
    q = torch.randn(batch, queries, heads, size).to(dtype)
    return q, *(torch.randn(batch, keys, kv_heads, size).to(dtype) for _ in range(2))


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_last_row_of_causal_attention(dtype):
    q, k, v = inputs(queries=70, dtype=dtype)
    whole = attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True).transpose(1, 2)
    truth, _ = reference(q.double(), k.double(), v.double(), lengths(70, 70))
    for new in (1, 3, 70):
        assert_composite(attention_decode(q[:, -new:], k, v, 70), whole[:, -new:], truth[:, -new:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_lies_behind_the_length_does_not_leak(isa, bad, queries, dtype):
    q, k, v = inputs(queries=queries, keys=600, dtype=dtype)
    for n in (5, 37, 512, 530):
        clean = attention_decode(q, k, v, lengths(n, 600))
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[0, n:], bad_v[0, n:] = bad, bad
        assert_exact(attention_decode(q, bad_k, bad_v, lengths(n, 600)), clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_key_touches_only_the_queries_that_take_it(isa, bad, dtype):
    q, k, v = inputs(queries=6, keys=40, dtype=dtype)
    clean = attention_decode(q, k, v, 40, window=7)
    bad_v = v.clone()
    bad_v[:, 30] = bad  # queries are tokens 34 to 39; those up to 37 see token 30
    out = attention_decode(q, k, bad_v, 40, window=7)
    assert not out[:, :4].isfinite().any()
    assert_exact(out[:, 4:], clean[:, 4:])
    bad_k = k.clone()
    bad_k[:, 37:] = math.nan
    out = attention_decode(q, bad_k, v, 40, window=7)
    assert out[:, 3:].isnan().all()
    assert_exact(out[:, :3], clean[:, :3])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_one_query_against_100000_keys(dtype):
    n = 100_000
    q, k, v = inputs(1, 1, 4, 2, n, 64, torch.float32 if dtype is torch.int8 else dtype)
    scales = {}
    if dtype is torch.int8:
        (k, ks), (v, vs) = (quantize_rows(t) for t in (k, v))
        scales = {"k_scale": ks, "v_scale": vs}
    out, lse = attention_decode(q, k, v, n, return_lse=True, **scales)
    truth, lse_truth = reference(
        q.double(), k if scales else k.double(), v if scales else v.double(), lengths(n), **scales
    )
    eager, lse_eager = reference(q, k, v, lengths(n), **scales)
    floor = {torch.bfloat16: 2**-9, torch.float16: 2**-11}.get(dtype, 2**-22) * truth.abs().max().item() * 4
    assert_composite(out, eager, truth, floor=floor)
    assert_composite(lse, lse_eager.float(), lse_truth, floor=1e-2 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("queries", [1, 3])
def test_the_logarithm_of_the_sum(isa, queries):
    q, k, v = inputs(queries=queries, keys=700)
    n, sinks = lengths(700, queries - 1), torch.randn(4)
    for options in ({}, {"sinks": sinks}, {"window": 20}, {"softcap": 3.0}, {"alibi_slopes": torch.rand(2, 4)}):
        ours = {"window": (19, 0)} if "window" in options else options  # the reference counts the token itself
        out, lse = attention_decode(q, k, v, n, return_lse=True, **ours)
        assert_exact(out, attention_decode(q, k, v, n, **ours))
        truth = reference(q.double(), k.double(), v.double(), n, **options)[1]
        assert_composite(lse, reference(q, k, v, n, **options)[1], truth, floor=2e-6 * 7)


def test_two_halves_of_a_cache_merge_by_their_sums():
    """What the log-sum-exp is for: attention over parts that lie elsewhere."""
    q, k, v = inputs(keys=900)
    parts = [attention_decode(q, k[:, part], v[:, part], n, return_lse=True)
             for part, n in ((slice(0, 300), 300), (slice(300, 900), 600))]  # fmt: skip
    whole, lse = attention_decode(q, k, v, 900, return_lse=True)
    merged = sum(torch.exp(part_lse - lse).transpose(1, 2)[..., None] * part for part, part_lse in parts)
    truth, _ = reference(q.double(), k.double(), v.double(), lengths(900, 900))
    assert_composite(merged, whole, truth, factor=4.0)


def test_a_sequence_has_the_same_bits_in_any_batch():
    q, k, v = inputs(batch=3, keys=1300)
    n = lengths(1300, 40, 600)
    together = attention_decode(q, k, v, n)
    for b in range(3):
        assert_exact(attention_decode(q[b : b + 1], k[b : b + 1], v[b : b + 1], n[b : b + 1]), together[b : b + 1])
        short = int(n[b])
        assert_exact(
            attention_decode(q[b : b + 1], k[b : b + 1, :short], v[b : b + 1, :short], short), together[b : b + 1]
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_give_the_same_bits_as_one_cache(isa, dtype):
    q, k, v = inputs(keys=640, dtype=dtype)
    expected = attention_decode(q, k, v, lengths(640, 55))
    for block in (16, 32, 128):
        blocks = 2 * (640 // block)
        table = torch.randperm(blocks + 3)[:blocks].to(torch.int32).view(2, -1)
        paged = [torch.full((blocks + 3, block, 2, 32), math.nan).to(dtype) for _ in range(2)]
        for cache, t in zip(paged, (k, v), strict=True):
            cache[table.flatten().long()] = t.reshape(blocks, block, 2, 32)
        table[1, -(-55 // block) :] = -1  # entries behind the sequence are not looked at
        assert_exact(attention_decode(q, *paged, lengths(640, 55), block_table=table), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_int8_cache_serves_queries_of_every_dtype(isa, dtype):
    q, k, v = inputs(keys=600, dtype=dtype)
    (k, ks), (v, vs) = (quantize_rows(t.float()) for t in (k, v))
    scales = {"k_scale": ks, "v_scale": vs}
    out = attention_decode(q, k, v, 600, **scales)
    truth, _ = reference(q.double(), k, v, lengths(600, 600), **scales)
    assert out.dtype == dtype
    assert_composite(out, reference(q, k, v, lengths(600, 600), **scales)[0], truth)


def test_lengths_are_numbers_or_tensors_of_either_kind():
    q, k, v = inputs()
    expected = attention_decode(q, k, v, lengths(41, 41))
    assert_exact(attention_decode(q, k, v, 41), expected)
    assert_exact(attention_decode(q, k, v, torch.tensor([41, 41])), expected)
    every_second = torch.tensor([41, 0, 41, 0], dtype=torch.int32)[::2]
    assert_exact(attention_decode(q, k, v, every_second), expected)


# -- append_to_cache_


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [0, 16])
def test_append_writes_the_new_tokens_and_nothing_else(dtype, block):
    _, k, v = inputs(keys=48, dtype=dtype)
    _, new_k, new_v = inputs(keys=5, dtype=dtype)
    n = lengths(12, 40)
    table = torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32) if block else None
    caches = [t.clone() if table is None else _paged(t, table, block) for t in (k, v)]
    assert append_to_cache_(*caches, n, new_k.mT.contiguous().mT, new_v, block_table=table) is None
    for cache, before, new in zip(caches, (k, v), (new_k, new_v), strict=True):
        expected = before.clone()
        for b in range(2):
            expected[b, n[b] : n[b] + 5] = new[b]
        assert_exact(cache, expected if table is None else _paged(expected, table, block))
    assert n.tolist() == [12, 40]


def _paged(cache, table, block):
    out = torch.empty(table.numel(), block, *cache.shape[2:], dtype=cache.dtype)
    out[table.flatten().long()] = cache.reshape(table.numel(), block, *cache.shape[2:])
    return out


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_append_to_an_int8_cache_quantizes_each_token_and_head(isa, dtype):
    caches = [torch.zeros(2, 2, 20, 32, dtype=torch.int8).transpose(1, 2) for _ in range(2)]
    scales = [torch.zeros(2, 20, 2) for _ in range(2)]
    _, k, v = inputs(keys=3, dtype=dtype)
    append_to_cache_(*caches, 6, k, v, k_scale=scales[0], v_scale=scales[1])
    for cache, scale, t in zip(caches, scales, (k, v), strict=True):
        codes, expected = quantize_rows(t.reshape(-1, 32))
        assert_exact(cache[:, 6:9].reshape(-1, 32), codes)
        assert_exact(scale[:, 6:9].reshape(-1), expected)
        assert not cache[:, :6].any()
        assert not cache[:, 9:].any()


def test_generation_step_by_step():
    """Appending one token at a time gives what a whole cache gives, bit for bit."""
    q, k, v = inputs(keys=20)
    caches = [torch.full_like(t, math.nan) for t in (k, v)]
    for n in range(20):
        append_to_cache_(*caches, n, k[:, n : n + 1], v[:, n : n + 1])
        assert_exact(attention_decode(q, *caches, n + 1), attention_decode(q, k, v, n + 1))


def test_append_compiles_in_one_graph():
    _, k, v = inputs(keys=3)
    expected, caches = ([torch.zeros(2, 8, 2, 32) for _ in range(2)] for _ in range(2))
    append_to_cache_(*expected, 2, k, v)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(caches, n, k, v):
        append_to_cache_(*caches, n, k, v)
        return attention_decode(k, *caches, n + 3)

    out = step(caches, lengths(2, 2), k, v)
    assert_exact(caches, expected)
    assert_exact(out, attention_decode(k, *expected, 5))


def test_append_passes_opcheck():
    caches, (_, k, v) = [torch.zeros(2, 8, 2, 32) for _ in range(2)], inputs(keys=3)
    torch.library.opcheck(torch.ops.lamina.attention_decode.append_, (*caches, lengths(2, 5), k, v, None, None, None))
    q, k, v = inputs()
    torch.library.opcheck(torch.ops.lamina.attention_decode.with_lse, (q, k, v, lengths(7, 70), *[None] * 8))


# -- what is refused

REFUSED = {
    "cache_seqlens[1] is 71, but the cache holds 0 to 70 keys": {"cache_seqlens": lengths(70, 71)},
    "cache_seqlens[0] is -1, but the cache holds 0 to 70 keys": {"cache_seqlens": lengths(-1, 7)},
    "cache_seqlens is float32, but must be int32 or int64": {"cache_seqlens": torch.ones(2)},
    "cache_seqlens has shape [3], but must be [2]": {"cache_seqlens": lengths(1, 2, 3)},
    "q is float64, but must be float32 or bfloat16 or float16": {"q": torch.zeros(2, 1, 4, 32, dtype=torch.float64)},
    "q is [2, 4, 32] and v_cache [2, 70, 2, 32], but both must have four dimensions": {"q": torch.zeros(2, 4, 32)},
    "k_cache is bfloat16, but must be int8 or of the dtype of q, float32": {
        "k_cache": torch.zeros(2, 70, 2, 32, dtype=torch.bfloat16)
    },
    "v_cache has shape [2, 60, 2, 32], but must be [2, 70, 2, *]": {"v_cache": torch.zeros(2, 60, 2, 32)},
    "k_cache is float32[2, 70, 2, 16], but must have the head size of q, 32": {"k_cache": torch.zeros(2, 70, 2, 16)},
    "q has 5 heads and k_cache has 2, but the first must be a multiple of the second": {"q": torch.zeros(2, 1, 5, 32)},
    "k_cache is float32[2, 70, 2, 32], but must have the 3 sequences of q; give a block_table for a cache of blocks": {
        "q": torch.zeros(3, 1, 4, 32), "cache_seqlens": lengths(1, 2, 3)},
    "k_scale goes with an int8 cache, but k_cache is float32": {"k_scale": torch.ones(2, 70, 2)},
    "softcap is -1, but must be positive": {"softcap": -1.0},
    "sinks has shape [2], but must be [4]": {"sinks": torch.zeros(2)},
    "alibi_slopes is float64, but must be float32": {"alibi_slopes": torch.zeros(4, dtype=torch.float64)},
    "block_table[1, 0] is 2, but the cache has blocks 0 to 1": {"block_table": lengths(0, 2).view(2, 1)},
    "block_table is int64, but must be int32": {"block_table": torch.zeros(2, 1, dtype=torch.int64)},
    "k_cache is int8, so k_scale must say what its codes are worth": {
        "k_cache": torch.zeros(2, 70, 2, 32, dtype=torch.int8), "v_cache": torch.zeros(2, 70, 2, 32, dtype=torch.int8)},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused(message):
    q, k, v = inputs()
    arguments = {"q": q, "k_cache": k, "v_cache": v, "cache_seqlens": lengths(7, 70), **REFUSED[message]}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        attention_decode(**arguments)
    assert str(error.value) == f"attention_decode: {message}"


def test_a_gradient_is_refused():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="it has no gradient; call it under"):
        attention_decode(q.requires_grad_(), k, v, 7)


def test_append_refuses_before_it_writes():
    caches, (_, k, v) = [torch.zeros(2, 8, 2, 32) for _ in range(2)], inputs(keys=3)
    with pytest.raises(ValueError, match=r"cache_seqlens\[1\] is 6 and 3 keys are added, but the cache holds 0 to 8"):
        append_to_cache_(*caches, lengths(0, 6), k, v)
    with pytest.raises(ValueError, match=r"k has shape .* but must be"):
        append_to_cache_(*caches, 0, k[:, :, :1], v)
    with pytest.raises(ValueError, match="v is bfloat16, but must be float32 like k"):
        append_to_cache_(*caches, 0, k, v.bfloat16())
    assert not caches[0].any()
    assert not caches[1].any()
    assert "append_to_cache_" in lamina.ops.__all__
