"""attention: against the float64 reference on every ISA, and the properties that hold without a tolerance."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_every_isa import expected_isa
from tolerances import EXP2_ERROR, assert_composite, assert_exact, assert_lossy, eps

from lamina import _C
from lamina.nn import attention as nn_attention
from lamina.ops import attention_panels, quantize_panels, token_panels, token_rows
from lamina.ops.attention import attention
from lamina.reference.attention import attention as reference
from lamina.reference.attention import attention_panels as panels_reference

DTYPES = [torch.float32, torch.bfloat16]
ALL_DTYPES = [*DTYPES, torch.float16, torch.float64]
# Around the vector widths (4, 8, 16), the row block (64) and the chunk of keys (256, at most 320).
LENGTHS = [1, 2, 3, 7, 15, 16, 17, 50, 63, 64, 65, 100, 128, 130, 257]
KEY_LENGTHS = [*LENGTHS, 24, 31, 256, 320, 321, 600]
HEAD_SIZES = [1, 3, 8, 17, 32, 63, 64, 65, 72, 80, 96, 128, 192, 256]
MASKS = ["none", "causal", "boolean", "additive", "boolean_keys", "additive_keys", "boolean_causal", "both"]


@pytest.fixture(autouse=True)
def on_its_isa(request, as_found):
    if "isa" in request.fixturenames:
        _C.force_isa(request.getfixturevalue("isa"))


def inputs(batch, heads, kv_heads, queries, keys, size, value_size, dtype=torch.float32, generator=None):
    """query [B, H, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv]."""
    shapes = ((batch, heads, queries, size), (batch, kv_heads, keys, size), (batch, kv_heads, keys, value_size))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def mask_options(kind, batch, heads, queries, keys, dtype=torch.float32, generator=None):
    """The keyword arguments of a mask of this kind; some rows of the random ones keep nothing."""

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    match kind:
        case "none":
            return {}
        case "causal":
            return {"is_causal": True}
        case "boolean":
            return {"attn_mask": uniform(batch, 1, queries, keys) < 0.7}
        case "boolean_keys":
            return {"attn_mask": uniform(batch, 1, 1, keys) < 0.6}
        case "boolean_causal":
            return {"attn_mask": torch.ones(queries, keys, dtype=torch.bool).tril()}
        case "both":
            return {"attn_mask": uniform(batch, 1, queries, keys) < 0.7, "is_causal": True}
        case "additive":
            bias = torch.randn(1, heads, queries, keys, generator=generator)
            return {"attn_mask": bias.masked_fill(uniform(1, heads, queries, keys) < 0.3, -math.inf)}
        case "additive_keys":
            bias = torch.randn(batch, 1, 1, keys, generator=generator)
            return {"attn_mask": bias.masked_fill(uniform(batch, 1, 1, keys) < 0.3, -math.inf).to(dtype)}
    raise AssertionError(kind)


def assert_as_good_as_sdpa(query, key, value, **options):
    options = {"enable_gqa": query.shape[-3] != key.shape[-3], **options}
    actual = attention(query, key, value, **options)
    assert actual.dtype == query.dtype
    truth = reference(query.double(), key.double(), value.double(), **options)
    group = query.shape[-3] // key.shape[-3]
    key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
    eager_options = {**options, "enable_gqa": False}
    if options.get("is_causal") and "attn_mask" in options:  # which torch takes on some of its paths only
        causal = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        eager_options |= {"attn_mask": options["attn_mask"] & causal, "is_causal": False}
    eager = F.scaled_dot_product_attention(query, key, value, **eager_options)
    # The yardstick of a few outputs may be exact by luck. Some roundings are always fair, all in float32: of the scaled
    # query, the weight and the sum, and of the score, which moves its weight by as much as the score is large; and one
    # to the output's dtype.
    largest = truth[truth.isfinite()].abs().max().item() if truth.isfinite().any() else 0.0
    scores = (query.double() @ key.double().mT).abs() / math.sqrt(query.shape[-1])
    score = scores[scores.isfinite()].max().item() if scores.isfinite().any() else 0.0
    roundings = (3 + max(1.0, score)) * torch.finfo(torch.float32).eps
    roundings += (query.dtype.itemsize == 2) * torch.finfo(query.dtype).eps
    assert_composite(actual, eager, truth, floor=roundings * largest)


# -- against the float64 reference


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 1, 3]),
    queries=st.sampled_from(LENGTHS),
    keys=st.sampled_from(KEY_LENGTHS),
    size=st.sampled_from(HEAD_SIZES),
    value_size=st.sampled_from([None, None, 1, 7, 16, 33, 64, 80, 256]),
    dtype=st.sampled_from([*DTYPES, torch.float16]),
    mask=st.sampled_from(MASKS),
    layout=st.sampled_from(["heads first", "tokens first", "columns apart"]),
    seed=st.integers(0, 2**16),
)
def test_attention_matches_the_reference(
    isa, batch, kv_heads, group, queries, keys, size, value_size, dtype, mask, layout, seed
):
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads * group
    tensors = inputs(batch, heads, kv_heads, queries, keys, size, value_size or size, dtype, generator)
    if layout == "tokens first":
        tensors = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors)
    if layout == "columns apart":
        tensors = (t.mT.contiguous().mT for t in tensors)
    options = mask_options(mask, batch, heads, queries, keys, dtype, generator)
    _C.poison_workspace(True)  # a read of scratch memory that nobody wrote gives NaN
    assert_as_good_as_sdpa(*tensors, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_runs_the_forced_isa(isa, dtype):
    attention(*inputs(1, 1, 1, 5, 5, 8, 8, dtype))
    table = "attention_f32_table" if dtype is torch.float32 else "attention_bf16_table"
    assert _C.last_isa() == expected_isa(table, isa)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive_keys"])
@pytest.mark.parametrize(("queries", "keys"), [(1000, 1000), (1, 2047), (3, 1023), (333, 1025), (1025, 64)])
def test_attention_over_many_chunks(queries, keys, mask, dtype):
    options = mask_options(mask, 1, 2, queries, keys, dtype)
    assert_as_good_as_sdpa(*inputs(1, 2, 2, queries, keys, 64, 64, dtype), **options)


# -- what torch has no op for


@st.composite
def features(draw):
    """Shapes, dtype and keyword arguments; `mask` is a kind of mask_options."""
    return {
        "batch": draw(st.integers(1, 2)),
        "kv_heads": draw(st.integers(1, 2)),
        "group": draw(st.sampled_from([1, 3])),
        "queries": draw(st.sampled_from([1, 2, 9, 33, 70, 130])),
        "keys": draw(st.sampled_from([1, 3, 40, 64, 257, 330, 600])),
        "size": draw(st.sampled_from([8, 33, 64])),
        "dtype": draw(st.sampled_from(ALL_DTYPES)),
        "mask": draw(st.sampled_from(["none", "none", "causal", "boolean", "additive", "additive_keys"])),
        "window": draw(st.sampled_from([None, None, 0, 5, (30, 2), (-1, 3), (64, None), (100, 0)])),
        "softcap": draw(st.sampled_from([None, None, 1.0, 30.0])),
        "alibi": draw(st.sampled_from([None, None, "heads", "batches"])),
        "sinks": draw(st.sampled_from([False, False, True])),
        "alignment": draw(st.sampled_from(["top_left", "bottom_right"])),
        "seed": draw(st.integers(0, 2**16)),
    }


@settings(max_examples=50, deadline=None, derandomize=True)
@given(f=features())
def test_attention_features_match_the_reference(isa, f):
    generator = torch.Generator().manual_seed(f["seed"])
    heads, dtype = f["kv_heads"] * f["group"], f["dtype"]
    q, k, v = inputs(f["batch"], heads, f["kv_heads"], f["queries"], f["keys"], f["size"], 24, dtype, generator)
    options = mask_options(f["mask"], f["batch"], heads, f["queries"], f["keys"], dtype, generator)
    options |= {"window": f["window"], "softcap": f["softcap"], "causal_alignment": f["alignment"]}
    if f["alibi"]:
        options["alibi_slopes"] = torch.rand((f["batch"], heads) if f["alibi"] == "batches" else heads) / 8
    if f["sinks"]:
        options["sinks"] = torch.randn(heads)
    _C.poison_workspace(True)
    assert_as_good_as_composite(q, k, v, **options)


def assert_as_good_as_composite(q, k, v, **options):
    """Output and log-sum-exp against float64, the reference in the dtype itself being the yardstick."""
    options = {"enable_gqa": q.shape[-3] != k.shape[-3], "return_lse": True, **options}
    out, lse = attention(q, k, v, **options)
    wide = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in options.items()
    }
    truth, truth_lse = reference(q.double(), k.double(), v.double(), **wide)
    eager, _ = reference(q, k, v, **{name: x.to(q.dtype) if x is not wide[name] else x for name, x in options.items()})
    largest = v.abs().max().item()
    roundings = 4 * torch.finfo(torch.promote_types(lse.dtype, torch.float32)).eps
    assert out.dtype == q.dtype
    assert_composite(
        out, eager.to(q.dtype), truth, floor=(roundings + (q.dtype.itemsize == 2) * torch.finfo(q.dtype).eps) * largest
    )
    # A score of 100 has the rounding error of 100, whatever computes it.
    _, yardstick = reference(
        *(t.to(lse.dtype) for t in (q, k, v)),
        **{n: x.to(lse.dtype) if x is not wide[n] else x for n, x in options.items()},
    )
    # The weights of the bfloat16 kernel, whose sum it is, are exact to 1e-4, and its scores as well.
    assert_composite(lse, yardstick, truth_lse, floor=2 * roundings + (q.dtype == torch.bfloat16) * 2e-4)
    assert_exact(lse == -math.inf, truth_lse == -math.inf)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_attention_with_lse_is_the_plain_call_bit_for_bit(dtype, mask):
    q, k, v = inputs(2, 3, 3, 70, 330, 40, 24, dtype)
    options = mask_options(mask, 2, 3, 70, 330)
    out, lse = attention(q, k, v, return_lse=True, **options)
    assert_exact(out, attention(q, k, v, **options))
    assert lse.shape == (2, 3, 70)
    assert_exact(attention(q, k, v, window=(-1, None), **options), out)
    assert_exact(attention(q[0, 0], k[0, 0], v[0, 0], return_lse=True)[1], attention(q, k, v, return_lse=True)[1][0, 0])


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("queries", [3, 70])
def test_attention_window_keeps_out_what_is_not_in_it(isa, dtype, queries):
    q, k, v = inputs(1, 2, 2, queries, 700, 32, 32, dtype)
    options = {"window": (20, 5), "causal_alignment": "bottom_right"}
    out = attention(q, k, v, **options)
    first = 700 - queries - 20
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[:, :, :first], bad_v[:, :, :first] = math.nan, math.inf
    assert_exact(attention(q, bad_k, bad_v, **options), out)
    bad_v[:, :, first] = math.nan  # which only the first query takes
    touched = attention(q, bad_k, bad_v, **options)
    assert touched[:, :, 0].isnan().all()
    assert_exact(touched[:, :, 1:], out[:, :, 1:])


@pytest.mark.parametrize("queries", [2, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_scores_of_any_size(isa, queries, dtype):
    """Weights are relative to a base that moves with the scores; whether it does is a matter of each row alone."""
    q, k, v = inputs(1, 2, 2, queries, 600, 32, 32, dtype)
    plain = attention(q, k, v)
    for factor in (40.0, -40.0, 300.0):
        far = q.clone()
        far[:, :, 1] *= factor
        out = attention(far, k, v)
        assert_exact(out[:, :, [0, *range(2, queries)]], plain[:, :, [0, *range(2, queries)]])
        assert_as_good_as_sdpa(far, k, v)
    shifted = k + 50  # the same for all keys, so that all scores of a row go up or down together
    assert_as_good_as_sdpa(q, shifted.to(dtype), v)
    rising = (k * torch.linspace(0, 30, 600)[:, None]).to(dtype)
    assert_as_good_as_sdpa(q, rising, v)
    assert_as_good_as_sdpa(q, rising.flip(2), v)


@pytest.mark.parametrize("queries", [2, 70])
def test_attention_sinks_take_weight(isa, queries):
    q, k, v = inputs(1, 3, 3, queries, 50, 16, 16)
    plain, plain_lse = attention(q, k, v, return_lse=True)
    without = attention(q, k, v, sinks=torch.full((3,), -math.inf))
    torch.testing.assert_close(without, plain)
    all_weight = attention(q, k, v, sinks=torch.full((3,), 500.0))
    assert all_weight.abs().max() < 1e-30
    sinks = torch.tensor([-1.0, 0.0, 4.0])
    out, lse = attention(q, k, v, sinks=sinks, return_lse=True)
    torch.testing.assert_close(lse, torch.logaddexp(plain_lse, sinks[:, None].expand(1, 3, queries)))
    torch.testing.assert_close(out, plain * (plain_lse - lse).exp()[..., None])
    nothing = torch.zeros(50, dtype=torch.bool)
    out, lse = attention(q, k, v, nothing, sinks=sinks, return_lse=True)
    assert_exact(out, torch.zeros_like(out))
    torch.testing.assert_close(lse, sinks[:, None].expand(1, 3, queries))


@pytest.mark.parametrize(("queries", "keys", "size"), [(5, 40, 33), (70, 330, 64), (130, 700, 64), (200, 200, 20)])
def test_attention_of_float32_computed_in_bfloat16(isa, queries, keys, size):
    q, k, v = inputs(1, 2, 2, queries, keys, size, size)
    for options in ({}, {"is_causal": True}, {"window": (30, 4)}, mask_options("boolean", 1, 2, queries, keys)):
        out = attention(q, k, v, compute_dtype=torch.bfloat16, **options)
        if isa != "avx512bf16":  # no instruction for it: float32 is no slower
            assert_exact(out, attention(q, k, v, return_lse=True, **options)[0])
            continue
        assert out.dtype == torch.float32
        narrow = (t.bfloat16() for t in (q, k, v))
        assert_exact(out.bfloat16(), attention(*narrow, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys", "size"), [(16, 40, 33), (70, 330, 64), (129, 700, 128), (200, 200, 20)])
def test_attention_with_int8_scores(isa, queries, keys, size, dtype):
    q, k, v = inputs(1, 4, 2, queries, keys, size, 40, dtype)
    k = k + 3 * torch.randn(size).to(dtype)  # what all keys have in common must not cost codes
    for options in (
        {},
        {"is_causal": True, "softcap": 10.0},
        {"window": (30, 4), "sinks": torch.randn(4)},
        mask_options("boolean", 1, 2, queries, keys),
        {**mask_options("additive", 1, 4, queries, keys), "compute_dtype": torch.bfloat16},
    ):
        out, lse = attention(q, k, v, enable_gqa=True, qk_dtype=torch.int8, return_lse=True, **options)
        if "vnni" not in isa and "bf16" not in isa:  # no instruction for it
            assert_exact(out, attention(q, k, v, enable_gqa=True, return_lse=True, **options)[0])
            continue
        options.pop("compute_dtype", None)
        truth, truth_lse = reference(q.double(), k.double(), v.double(), enable_gqa=True, return_lse=True, **options)
        assert_lossy(out, truth, min_sqnr_db=36)
        judged = truth_lse.isfinite()
        assert_lossy(lse[judged], truth_lse[judged], min_sqnr_db=40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_int8_scores_does_not_leak_excluded_keys(isa, dtype):
    q, k, v = inputs(1, 2, 2, 70, 100, 32, 32, dtype)
    keep = torch.arange(100) < 60
    padded_k, padded_v = k.clone(), v.clone()
    padded_k[:, :, 60:], padded_v[:, :, 60:] = 0, 0
    clean = attention(q, padded_k, padded_v, keep, qk_dtype=torch.int8)
    for bad in (math.nan, math.inf):
        padded_k[:, :, 60:], padded_v[:, :, 60:] = bad, bad
        assert_exact(attention(q, padded_k, padded_v, keep, qk_dtype=torch.int8), clean)
    q[:, :, 3, 5] = math.nan
    out = attention(q, k, v, qk_dtype=torch.int8)
    assert out[:, :, 3].isnan().all()
    assert out[:, :, [0, 1, 2, *range(4, 70)]].isfinite().all()


def test_attention_of_one_query_and_very_many_keys(isa):
    q, k, v = inputs(1, 1, 1, 1, 100_000, 16, 16)
    assert_as_good_as_sdpa(q, k, v)
    assert_as_good_as_composite(q, k, v, window=(50_000, 0), causal_alignment="bottom_right")


def test_attention_features_have_gradients():
    q, k, v = inputs(1, 4, 2, 9, 12, 8, 8, torch.float64)
    slopes, sinks = torch.rand(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def call(q, k, v, sinks):
        return attention(
            q, k, v, enable_gqa=True, is_causal=True, window=(5, 0), softcap=2.0, alibi_slopes=slopes, sinks=sinks
        )

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in (q, k, v, sinks)])


def test_attention_features_in_torchs_machinery():
    q, k, v = inputs(2, 4, 2, 9, 12, 8, 6)
    slopes, sinks = torch.rand(4), torch.randn(4)
    op = torch.ops.lamina.attention.with_lse
    torch.library.opcheck(
        op, (q, k, v, None, True, None, True, 5, -1, True, 3.0, slopes, sinks, False, 0.0, None, True)
    )
    plain = (-1, -1, False, 0.0, None, None)
    torch.library.opcheck(op, (q[0, :2], k[0], v[0], None, False, 0.1, False, *plain, True))

    def call(q, k, v):
        return attention(q, k, v, enable_gqa=True, window=(5, 1), softcap=3.0, alibi_slopes=slopes, return_lse=True)

    expected = call(q, k, v)
    for actual in (torch.compile(call, fullgraph=True)(q, k, v), torch.vmap(call)(q[:, None], k[:, None], v[:, None])):
        for one, other in zip(actual, expected, strict=True):
            assert_exact(one.reshape(other.shape), other)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = call(q, k, v)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (1, 2, 3)}, r"attention: window is \(1, 2, 3\), but must be a number of keys or \(left, right\)"),
        ({"window": -2}, "attention: window is -2, but must be a number of keys"),
        ({"softcap": -1.0}, "attention: softcap is -1, but must be positive, or 0 for none"),
        (
            {"causal_alignment": "left"},
            "attention: causal_alignment is 'left', but must be 'top_left' or 'bottom_right'",
        ),
        (
            {"compute_dtype": torch.float16},
            "attention: compute_dtype is torch.float16, but must be torch.bfloat16 or None",
        ),
        ({"qk_dtype": torch.float16}, "attention: qk_dtype is torch.float16, but must be torch.int8 or None"),
        ({"alibi_slopes": torch.ones(3)}, r"attention: alibi_slopes is float32\[3\], but must be \[2\] or \[1, 2\]"),
        ({"sinks": torch.ones(3)}, r"attention: sinks has shape \[3\], but must be \[2\]"),
    ],
    ids=str,
)
def test_attention_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        attention(*inputs(1, 2, 2, 5, 7, 8, 8), **options)


def test_attention_of_large_scores_is_stable(isa):
    query, key, value = inputs(1, 2, 2, 70, 300, 64, 64)
    assert_as_good_as_sdpa(query * 30, key * 30, value)
    assert_as_good_as_sdpa(query, key, value, scale=-2.5)
    assert_as_good_as_sdpa(query, key, value, scale=0.0)


# -- masks


def mask_shapes() -> list[tuple[int, ...]]:
    shapes = [(70, 90), (1, 90), (70, 1), (1, 1), (3, 70, 90), (1, 1, 90)]
    for b in (1, 2):
        for h in (1, 3):
            for queries in (1, 70):
                for keys in (1, 90):
                    shapes.append((b, h, queries, keys))
    return shapes


@pytest.mark.parametrize("shape", mask_shapes(), ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_attention_takes_every_mask_that_broadcasts(shape, dtype):
    q, k, v = inputs(2, 3, 3, 70, 90, 32, 32, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    mask = torch.rand(shape) < 0.7 if dtype == torch.bool else torch.randn(shape).to(dtype)
    assert_as_good_as_sdpa(q, k, v, attn_mask=mask)
    assert_as_good_as_sdpa(q[:, :, :2], k, v, attn_mask=mask[..., :2, :])


def test_attention_takes_masks_with_any_strides(isa):
    q, k, v = inputs(2, 3, 3, 70, 90, 32, 32)
    for mask in (torch.rand(2, 3, 90, 70) < 0.7, torch.randn(2, 3, 90, 70), torch.randn(2, 3, 180, 70)[:, :, ::2]):
        assert_as_good_as_sdpa(q, k, v, attn_mask=mask.mT)
        assert_as_good_as_sdpa(q[:, :, :1], k, v, attn_mask=mask.mT[:, :, :1])
    assert_as_good_as_sdpa(q, k, v, attn_mask=(torch.rand(2, 1, 70, 1) < 0.7).expand(2, 3, 70, 90))


@pytest.mark.parametrize("queries", [1, 3, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_query_without_keys_is_zero(isa, dtype, queries):
    q, k, v = inputs(1, 2, 2, queries, 600, 32, 32, dtype)
    keep = torch.rand(1, 1, queries, 600) < 0.5
    keep[..., 0, :] = False
    keep[..., 300:] = False  # the last chunk is empty for all
    for mask in (keep, torch.zeros(keep.shape).masked_fill(~keep, -math.inf)):
        out = attention(q, k, v, attn_mask=mask)
        assert_exact(out[:, :, 0], torch.zeros_like(out[:, :, 0]))
        assert out[:, :, 1:].isfinite().all()
        assert_as_good_as_sdpa(q, k, v, attn_mask=mask)
    nothing = torch.zeros(600, dtype=torch.bool).expand(1, 600)
    assert_exact(attention(q, k, v, attn_mask=nothing), torch.zeros_like(out))


def test_attention_with_the_lowest_finite_mask_is_the_mean(isa):
    """finfo.min is no -inf: a row full of it weighs all keys alike, as softmax does."""
    q, k, v = inputs(1, 2, 2, 20, 40, 16, 16)
    mask = torch.full((20, 40), torch.finfo(torch.float32).min)
    torch.testing.assert_close(attention(q, k, v, attn_mask=mask), v.mean(2, keepdim=True).expand_as(q))
    mask[:, :10] = 0
    torch.testing.assert_close(attention(q, k, v, attn_mask=mask), attention(q, k[:, :, :10], v[:, :, :10]))


@pytest.mark.parametrize("queries", [2, 70])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_attention_does_not_leak_excluded_keys(isa, bad, dtype, queries):
    q, k, v = inputs(1, 2, 2, queries, 100, 32, 32, dtype)
    keep = torch.rand(1, 1, queries, 100) < 0.5
    keep[..., 60:] = False
    keep[..., 0] = True
    clean = attention(q, k, v, attn_mask=keep)
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[:, :, 60:], bad_v[:, :, 60:] = bad, bad
    assert_exact(attention(q, bad_k, bad_v, attn_mask=keep), clean)
    assert_exact(
        attention(q, bad_k, bad_v, attn_mask=keep.new_ones(100).index_fill(0, torch.arange(60, 100), False)),
        attention(q, k[:, :, :60], v[:, :, :60]),
    )
    # A key that some rows keep and others do not: exactly the first are touched.
    bad_v = v.clone()
    bad_v[:, :, 5] = bad
    out = attention(q, k, bad_v, attn_mask=keep)
    touched = keep[0, 0, :, 5]
    assert not out[:, :, touched].isfinite().any()
    assert_exact(out[:, :, ~touched], clean[:, :, ~touched])


@pytest.mark.parametrize("queries", [2, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_spreads_nan_only_where_it_must(isa, dtype, queries):
    q, k, v = inputs(1, 1, 1, queries, 100, 24, 24, dtype)
    bad = q.clone()
    bad[0, 0, 1, 3] = math.nan
    out = attention(bad, k, v)
    assert out[0, 0, 1].isnan().all()
    assert out[0, 0, 0].isfinite().all()
    assert out[0, 0, 2:].isfinite().all()
    mask = torch.zeros(queries, 100)
    mask[1, 99] = math.nan
    out = attention(q, k, v, attn_mask=mask)
    assert out[0, 0, 1].isnan().all()
    assert out[0, 0, [0, *range(2, queries)]].isfinite().all()
    bad = k.clone()
    bad[0, 0, 1] = math.nan
    out = attention(q, bad, v, is_causal=True)
    assert out[0, 0, 0].isfinite().all()
    assert out[0, 0, 1:].isnan().all()


# -- properties


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_ones_is_one(isa, dtype, mask):
    q, k, v = inputs(2, 2, 2, 70, 330, 40, 24, dtype)
    options = mask_options(mask, 2, 2, 70, 330)
    out = attention(q, k, torch.ones_like(v), **options)
    has_keys = reference(q.double(), k.double(), torch.ones_like(v).double(), **options) > 0
    # A weighted mean of ones: the weights' rounding (bfloat16) and the division are all that is left.
    tolerance = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (out.double() - has_keys.double()).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_causal_does_not_look_ahead(isa, dtype):
    q, k, v = inputs(1, 2, 2, 150, 150, 32, 32, dtype)
    out = attention(q, k, v, is_causal=True)
    for i in (0, 1, 15, 16, 63, 64, 100):
        later_k, later_v = k.clone(), v.clone()
        later_k[:, :, i + 1 :], later_v[:, :, i + 1 :] = 7, math.nan
        assert_exact(attention(q, later_k, later_v, is_causal=True)[:, :, : i + 1], out[:, :, : i + 1])


@pytest.mark.parametrize(("queries", "keys"), [(30, 100), (100, 30), (1, 40)])
def test_attention_causal_is_aligned_top_left(isa, queries, keys):
    assert_as_good_as_sdpa(*inputs(1, 2, 2, queries, keys, 32, 32), is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_does_not_depend_on_the_order_of_keys(isa, dtype):
    q, k, v = inputs(1, 2, 2, 70, 400, 64, 64, dtype)
    order = torch.randperm(400)
    truth = reference(q.double(), k.double(), v.double())
    assert_composite(attention(q, k[:, :, order], v[:, :, order]), attention(q, k, v), truth, factor=4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_gives_the_same_bits_for_every_number_of_threads(mask, dtype):
    q, k, v = inputs(2, 3, 3, 200, 300, 64, 64, dtype)
    options = mask_options(mask, 2, 3, 200, 300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = attention(q, k, v, **options)
        torch.set_num_threads(2)
        for _ in range(3):
            assert_exact(attention(q, k, v, **options), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2), (4, 4)])
@pytest.mark.parametrize("queries", [1, 5, 33, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_groups_of_heads_share_keys(isa, dtype, queries, heads, kv_heads):
    q, k, v = inputs(2, heads, kv_heads, queries, 70, 32, 32, dtype)
    for mask in ("none", "causal", "boolean", "additive"):
        options = mask_options(mask, 2, heads, queries, 70)
        assert_as_good_as_sdpa(q, k, v, enable_gqa=True, **options)


# -- strides, sizes, layouts


def test_attention_takes_any_strides(isa):
    q, k, v = inputs(2, 4, 4, 70, 90, 32, 32)
    expected = attention(q, k, v)

    def padded(t):
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), math.nan, dtype=t.dtype)
        wide[..., 1:-2] = t  # the base is off by one element
        return wide[..., 1:-2]

    assert_exact(attention(padded(q), padded(k), padded(v)), expected)
    assert_exact(attention(*(t.mT.contiguous().mT for t in (q, k, v))), expected)
    assert_exact(attention(*(t.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1) for t in (q, k, v))), expected)
    shared = attention(q, k[:1, :1].expand_as(k), v[:1, :1].expand_as(v))
    assert_exact(shared, attention(q, k[:1, :1].repeat(2, 4, 1, 1), v[:1, :1].repeat(2, 4, 1, 1)))
    one_key = attention(q, k[:, :, :1].expand_as(k), v[:, :, :1].expand_as(v))
    torch.testing.assert_close(one_key, v[:, :, :1].expand_as(q))
    packed = torch.randn(2, 70, 3, 4, 32)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    assert_as_good_as_sdpa(q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [1, 3])
def test_attention_takes_misaligned_bfloat16_pairs(dtype, shift):
    q, k, v = inputs(1, 2, 2, 20, 40, 32, 32, dtype)
    wide = (torch.empty(*t.shape[:-1], 33 + shift, dtype=dtype) for t in (q, k, v))
    moved = [w[..., shift : shift + 32].copy_(t) for w, t in zip(wide, (q, k, v), strict=True)]
    assert_exact(attention(*moved), attention(q, k, v))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_attention_of_nothing(isa, shape):
    batch, heads, queries, keys = shape
    q, k, v = inputs(batch, heads, heads, queries, keys, 8, 6)
    out = attention(q, k, v)
    assert_exact(out, torch.zeros(batch, heads, queries, 6))
    assert_exact(attention(q, k, v, is_causal=True), out)
    assert_exact(attention(q, k, v, attn_mask=torch.ones(queries, keys, dtype=torch.bool)), out)


@pytest.mark.parametrize(
    ("query", "key", "enable_gqa"),
    [
        ((5, 8), (7, 8), False),
        ((3, 5, 8), (3, 7, 8), False),
        ((6, 5, 8), (3, 7, 8), True),
        ((2, 3, 4, 5, 8), (2, 3, 4, 6, 8), False),
        ((2, 2, 3, 5, 8), (2, 1, 3, 7, 8), False),
        ((1, 2, 5, 8), (3, 2, 7, 8), False),
        ((2, 1, 5, 8), (2, 4, 7, 8), False),
        ((5, 8), (3, 2, 7, 8), False),
    ],
    ids=str,
)
def test_attention_has_torchs_shape_rules(query, key, enable_gqa):
    q, k, v = torch.randn(query), torch.randn(key), torch.randn(key)
    for mask in (None, torch.rand(query[-2], key[-2]) < 0.8):
        out = attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)
        eager = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)
        torch.testing.assert_close(out, eager.nan_to_num(0))


@pytest.mark.parametrize("value_size", [8, 6])
def test_attention_keeps_the_querys_memory_order(value_size):
    q, k, v = inputs(2, 3, 3, 5, 7, 8, value_size)
    assert attention(q, k, v).is_contiguous()
    projected = torch.randn(2, 5, 3 * 8).unflatten(-1, (3, 8)).transpose(1, 2)
    assert attention(projected, k, v).transpose(1, 2).is_contiguous()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(order=st.permutations([0, 1, 2, 3]), expand=st.lists(st.integers(0, 2), max_size=2), sizes=st.data())
def test_attention_output_layout_suits_the_kernel(order, expand, sizes):
    """Whatever the query's strides, the output's last dimension is contiguous and fake agrees with real."""
    shape = [sizes.draw(st.integers(1, 4)) for _ in range(4)]
    query = torch.randn([shape[i] for i in order]).permute([order.index(i) for i in range(4)])
    for dim in expand:
        query = query[(slice(None),) * dim + (slice(0, 1),)].expand(shape)
    out = attention(query, query, query)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, query, query))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = attention(*[mode.from_tensor(query)] * 3)
    # Strides of dimensions of size 1 say nothing, and torch.empty_like itself gives a fake tensor others there.
    assert [n for n, size in zip(fake.stride(), shape, strict=True) if size > 1] == [
        n for n, size in zip(out.stride(), shape, strict=True) if size > 1
    ]


@pytest.mark.slow
def test_attention_addresses_past_two_to_the_31():
    wide = torch.empty(2**31 + 3 * 64, dtype=torch.bfloat16)  # 4 GiB, touched only where the views are
    key = wide.as_strided((1, 1, 3, 64), (1, 1, 2**30, 1)).copy_(torch.randn(1, 1, 3, 64))
    q = torch.randn(1, 1, 5, 64, dtype=torch.bfloat16)
    assert_exact(attention(q, key, key), attention(q, key.clone(), key.clone()))


# -- the op in PyTorch's machinery


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_passes_opcheck(dtype, mask):
    op = torch.ops.lamina.attention.default
    options = mask_options(mask, 2, 3, 5, 7, dtype)
    rest = (options.get("attn_mask"), options.get("is_causal", False))
    for layout in (lambda t: t, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)):
        q, k, v = (layout(t) for t in inputs(2, 3, 3, 5, 7, 8, 6, dtype))
        torch.library.opcheck(op, (q, k, v, *rest, None, False))
    q, k, v = inputs(2, 6, 3, 5, 7, 8, 8, dtype)
    torch.library.opcheck(op, (q, k, v, None, False, 0.3, True))
    torch.library.opcheck(op, (q[0], k[0, :1], v[0, :1], None, False, 0.3, False))


def test_attention_compiles_and_exports():
    class Model(torch.nn.Module):
        def forward(self, x):
            q, k, v = x.unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            return attention(q * 2, k, v, is_causal=True).transpose(1, 2).flatten(2)

    x, model = torch.randn(2, 9, 96), Model()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({1: length},))
    assert torch.ops.lamina.attention.default in {n.target for n in exported.graph.nodes}
    longer = torch.randn(2, 30, 96)
    torch.testing.assert_close(exported.module()(longer), model(longer))


def test_attention_leaves_the_rest_to_torch():
    q, k, v = inputs(1, 2, 2, 5, 7, 8, 8)
    args = [t.double() for t in (q, k, v)]
    assert_exact(attention(*args), F.scaled_dot_product_attention(*args))
    wide = inputs(1, 2, 2, 5, 7, 300, 300)
    assert_exact(attention(*wide), F.scaled_dot_product_attention(*wide))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v)
    assert_exact(out, attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


def test_attention_layer():
    layer = nn_attention.ScaledDotProductAttention.from_float(torch.nn.Identity().eval())
    assert not layer.training
    assert not layer.state_dict()
    q, k, v = inputs(1, 2, 2, 5, 7, 8, 8)
    mask = torch.rand(5, 7) < 0.8
    assert_exact(layer(q, k, v), attention(q, k, v))
    assert_exact(layer(q, k, v, attn_mask=mask), attention(q, k, v, attn_mask=mask))
    assert_exact(layer(q, k, v, is_causal=True), attention(q, k, v, is_causal=True))


# -- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.randn(1, 2, 7, 9)}, r"attention: key has shape \[1, 2, 7, 9\], but must be \[1, \*, \*, 8\]"),
        ({"key": torch.randn(1, 2, 7, 8).double()}, "attention: key is float64 and value is float32, but both"),
        ({"value": torch.randn(1, 2, 6, 8)}, r"attention: value has shape \[1, 2, 6, 8\], but must be \[1, 2, 7, \*\]"),
        ({"attn_mask": torch.ones(5, 7).int()}, "attention: attn_mask is int32, but must be bool or float32"),
        ({"attn_mask": torch.ones(5, 7).double()}, "attention: attn_mask is float64, but must be bool or float32"),
        (
            {"attn_mask": torch.ones(4, 7)},
            r"attention: attn_mask is float32\[4, 7\], but must broadcast to \[1, 4, 5, 7\]",
        ),
        ({"key": torch.randn(1, 3, 7, 8), "value": torch.randn(1, 3, 7, 8)}, "query has 4 heads and key has 3"),
        ({"query": torch.randn(8)}, r"query, key and value are \[8\]"),
    ],
)
def test_attention_refuses_in_one_sentence(change, message):
    q, k, v = inputs(1, 4, 2, 5, 7, 8, 8)
    with pytest.raises(ValueError, match=message):
        attention(**{"query": q, "key": k, "value": v, "enable_gqa": True, **change})


def test_attention_op_refuses_other_dtypes():
    q, k, v = (t.to(torch.int8) for t in inputs(1, 2, 2, 5, 7, 8, 8))
    with pytest.raises(ValueError, match="attention: query is int8, but must be float32 or bfloat16"):
        torch.ops.lamina.attention(q, k, v, None, False, None, False)
    q, k, v = inputs(1, 2, 2, 5, 7, 300, 8)
    with pytest.raises(ValueError, match="its head size must be 1 to 256"):
        torch.ops.lamina.attention(q, k, v, None, False, None, False)


# -- panels of tokens


def panels_of(sequences, length, heads, size, value_size, generator, value=1.0):
    """query, key, value [sequences, length, heads * size] as parts of one tensor of panels, and as [B, H, L, D]."""
    widths = (heads * size, heads * size, heads * value_size)
    whole = value * torch.randn(sequences, length, sum(widths), generator=generator)
    rows = [t.unflatten(2, (heads, -1)).transpose(1, 2) for t in whole.split(widths, 2)]
    return token_panels(whole).split(widths, 1), rows


def rows_of(panels, sequences, length, heads):
    return token_rows(panels, (sequences, length)).unflatten(2, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "shared"])
@pytest.mark.parametrize(
    ("sequences", "length", "heads", "size", "value_size"),
    [
        (1, 1, 1, 1, 1),
        (2, 5, 3, 8, 8),
        (1, 32, 2, 64, 64),
        (2, 33, 2, 17, 5),
        (3, 63, 1, 3, 9),
        (1, 128, 2, 64, 64),
        (1, 300, 1, 80, 48),
    ],
)
def test_panels_are_as_good_as_torch(isa, sequences, length, heads, size, value_size, mask, generator):
    panels, rows = panels_of(sequences, length, heads, size, value_size, generator)
    given = None
    if mask in ("boolean", "shared"):
        given = torch.rand(1 if mask == "shared" else sequences, length, generator=generator) < 0.7
        given[:, 0] = True
    elif mask == "additive":
        given = torch.randn(sequences, length, generator=generator)
        given[:, 1::3] = -math.inf
    ours = attention_panels(*panels, length=length, heads=heads, mask=given)
    full = None if given is None else given[:, None, None, :]
    wide = full.double() if mask == "additive" else full
    truth = reference(*(t.double() for t in rows), wide)
    eager = F.scaled_dot_product_attention(*rows, full)
    floor = eps(torch.float32) * truth.abs().max().item() + EXP2_ERROR * rows[2].abs().max().item()
    assert_composite(rows_of(ours, sequences, length, heads), eager, truth, floor=floor)
    again = panels_reference(*(t.double() for t in panels), length=length, heads=heads, mask=given)
    assert_composite(rows_of(again.float(), sequences, length, heads), eager, truth)
    quantized = attention_panels(*panels, length=length, heads=heads, mask=given, quantize=True)
    assert_exact(quantized, quantize_panels(ours))


@pytest.mark.parametrize("length", [1, 31, 33, 128])
@pytest.mark.parametrize(("size", "value_size"), [(64, 64), (7, 3)])
def test_panels_in_bfloat16(isa, length, size, value_size, generator):
    panels, rows = panels_of(2, length, 3, size, value_size, generator)
    mask = torch.rand(2, length, generator=generator) < 0.8
    mask[:, 0] = True
    options = {"length": length, "heads": 3, "mask": mask}
    ours = attention_panels(*panels, **options, compute_dtype=torch.bfloat16)
    truth = reference(*(t.double() for t in rows), mask[:, None, None, :])
    assert_lossy(rows_of(ours, 2, length, 3), truth, min_sqnr_db=40.0)
    if isa != "avx512bf16":
        assert_exact(ours, attention_panels(*panels, **options))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_panels_leave_excluded_keys_alone(isa, compute_dtype, generator):
    """A key that takes no part may hold anything, and so may what lies behind the last token."""
    (q, k, v), _ = panels_of(1, 40, 2, 16, 16, generator)
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[0, 7], mask[0, 35] = False, False
    options = {"length": 40, "heads": 2, "mask": mask, "compute_dtype": compute_dtype}
    clean = token_rows(attention_panels(q, k, v, **options), (40,))
    k, v = k.clone(), v.clone()
    for panel, lane in ((0, 7), (1, 3), (1, 8), (1, 31)):
        k[panel, :, lane], v[panel, :, lane] = math.inf, math.nan
    assert_exact(token_rows(attention_panels(q, k, v, **options), (40,)), clean)
    del options["mask"]
    whole = token_rows(attention_panels(*panels_of(1, 40, 2, 16, 16, generator)[0], **options), (40,))
    assert whole.isfinite().all()
    nothing = attention_panels(q, q, q, **options, mask=torch.zeros(1, 40, dtype=torch.bool))
    assert (token_rows(nothing, (40,)) == 0).all()


def test_panels_of_large_scores(isa, generator):
    """Scores far beyond the range of exp are taken relative to their largest."""
    panels, rows = panels_of(1, 50, 1, 16, 16, generator, value=30.0)
    ours = rows_of(attention_panels(*panels, length=50, heads=1), 1, 50, 1)
    truth = reference(*(t.double() for t in rows))
    assert_composite(ours, F.scaled_dot_product_attention(*rows), truth, floor=1e-4 * truth.abs().max().item())


@pytest.mark.parametrize(("sequences", "length"), [(1, 30), (1, 128), (3, 70)])
def test_panels_do_not_depend_on_threads(isa, sequences, length, generator):
    """Shares of panels, and of the heads of one panel."""
    panels, _ = panels_of(sequences, length, 12, 64, 64, generator)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            (
                attention_panels(*panels, length=length, heads=12),
                *attention_panels(*panels, length=length, heads=12, quantize=True),
            )
        )
    for other in results[1:]:
        assert_exact(other, results[0])


def test_panels_opcheck(generator):
    panels, _ = panels_of(2, 40, 2, 16, 8, generator)
    for op in (torch.ops.lamina.attention.panels, torch.ops.lamina.attention.panel_codes):
        torch.library.opcheck(op, (*panels, torch.ones(2, 40, dtype=torch.bool), 40, 2, 0.25, False))


def test_panels_that_do_not_fit(generator):
    (q, k, v), _ = panels_of(2, 40, 2, 16, 8, generator)
    fits = {"length": 40, "heads": 2}
    for arguments, options, message in (
        ((q[0], k, v), fits, r"attention_panels: query has shape \[32, 32\]"),
        ((q, k[:2], v), fits, "attention_panels: key has shape"),
        ((q, k, v[:, :, :16]), fits, "attention_panels: value has shape"),
        ((q.double(), k, v), fits, "attention_panels: query is float64"),
        ((q, k, v), fits | {"heads": 3}, "3 heads do not divide 32 features of the query and 16 of the value"),
        ((q, k, v), fits | {"heads": 0}, "0 heads do not divide"),
        ((q, k, v), fits | {"length": 70}, "query has 4 panels, but a sequence of 70 tokens has 3"),
        ((q, k, v), fits | {"length": 0}, "a sequence of 0 tokens"),
        ((q, k, v), fits | {"mask": torch.ones(3, 40)}, "mask has 3 rows, but there are 2 sequences"),
        ((q, k, v), fits | {"mask": torch.ones(2, 64)}, "mask has shape"),
        ((q, k, v), fits | {"mask": torch.ones(2, 40).int()}, "mask is int32"),
        ((q, k, v), fits | {"compute_dtype": torch.float16}, "compute_dtype is torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_panels(*arguments, **options)
    wide = torch.ones(1, 257, 32)
    with pytest.raises(ValueError, match="heads have 257 features, but at most 256 are supported"):
        attention_panels(wide, wide, wide, length=5, heads=1)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_the_kernel_of_panels_that_ran(isa, compute_dtype, generator):
    panels, _ = panels_of(1, 5, 1, 4, 4, generator)
    attention_panels(*panels, length=5, heads=1, compute_dtype=compute_dtype)
    table = "attention_panels_f32_table" if compute_dtype is None else "attention_panels_as_bf16_table"
    assert _C.last_isa() == expected_isa(table, isa)
