"""attention on a GPU or in Triton's interpreter: the cases of tests/cases.py, and what holds beside them."""

import importlib
import math

import pytest
import torch
from cases import SUITES, attention_eager, attention_truth
from compiled_cases import meta
from interpreter_repairs import repair
from tolerances import assert_composite, assert_exact, eps
from torch.utils._pytree import tree_map_only

from lamina.ops import attention, why_not_fused
from lamina.reference.attention import attention as reference

repair()
ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities and NaN in the interpreter
SUITE = SUITES["attention"]
# The interpreter takes seconds for what has many blocks.
CASES = [case for case in SUITE.cases if ON_GPU or not {"threads"} & case.tags]


def inputs(batch, heads, kv_heads, queries, keys, size, value_size=None, dtype=torch.float32):
    """query [B, H, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv], on the CPU."""
    sizes = (heads, queries, size), (kv_heads, keys, size), (kv_heads, keys, value_size or size)
    return tuple(torch.randn(batch, *shape).to(dtype) for shape in sizes)


def roundings(value):
    """Of a weighted mean, relative to the largest value, that are always fair: of products on tensor cores, which for
    float32 are made of three of TF32, and of the weight and the output to the dtype."""
    return 8 * eps(torch.float32) + 2 * (value.dtype.itemsize == 2) * eps(value.dtype)


def on(device, *tensors):
    moved = tuple(t.to(device) if isinstance(t, torch.Tensor) else t for t in tensors)
    return moved if len(moved) > 1 else moved[0]


def assert_matches(device, q, k, v, **options):
    """Output and log-sum-exp against float64, the reference in float32 from the same inputs being the yardstick."""
    options = {"enable_gqa": q.shape[-3] != k.shape[-3], **options}
    there = {name: on(device, x) for name, x in options.items()}
    out, lse = (t.cpu() for t in attention(*on(device, q, k, v), return_lse=True, **there))
    doubled = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in options.items()
    }
    floats = {name: x.float() if doubled[name] is not x else x for name, x in options.items()}
    truth, truth_lse = reference(q.double(), k.double(), v.double(), return_lse=True, **doubled)
    eager, eager_lse = reference(q.float(), k.float(), v.float(), return_lse=True, **floats)
    largest = v[v.isfinite()].abs().max().item()
    assert out.dtype == q.dtype
    assert_composite(out, eager.to(q.dtype), truth, floor=roundings(v) * largest)
    size = truth_lse[truth_lse.isfinite()].abs().max().item() if truth_lse.isfinite().any() else 0.0
    assert_composite(lse, eager_lse, truth_lse, factor=4, floor=8 * eps(torch.float32) * max(1.0, size))
    return out, lse


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_float64(device, case, seed):
    given = case.inputs(seed)
    out = torch.ops.lamina.attention(*tree_map_only(torch.Tensor, lambda t: t.to(device), given))
    assert out.dtype == given[0].dtype
    value = given[2]
    largest = value.abs().max().item() if value.numel() else 0.0
    assert_composite(out.cpu(), attention_eager(*given), attention_truth(*given), floor=roundings(value) * largest)


FEATURES = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal_bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"window": (9, 5)},
    "window_bottom_right": {"window": (20, 0), "causal_alignment": "bottom_right"},
    "window_of_itself": {"window": 0},
    "softcap": {"softcap": 2.0, "is_causal": True},
    "negative_scale": {"scale": -0.3, "window": (30, None)},
    "no_scale": {"scale": 0.0, "is_causal": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FEATURES)
def test_features(device, name, dtype):
    assert_matches(device, *inputs(1, 2, 1, 70, 90, 32, dtype=dtype), **FEATURES[name])


def test_slopes_and_sinks(device):
    tensors = inputs(2, 4, 2, 40, 50, 16, 24)
    assert_matches(device, *tensors, alibi_slopes=torch.rand(4) / 8, is_causal=True)
    assert_matches(device, *tensors, alibi_slopes=torch.rand(2, 4) / 8, sinks=torch.randn(4), softcap=3.0)
    out, lse = assert_matches(device, *tensors, attn_mask=torch.zeros(50, dtype=torch.bool), sinks=torch.randn(4))
    assert not out.any()
    assert lse.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 70, 90), (2, 1, 70, 90), (70, 90), (3, 1, 90), (2, 1, 70, 1), (1, 1), (90,)])
@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_masks(device, shape, kind):
    keep = torch.rand(shape) < 0.7
    added = torch.randn(shape).masked_fill(~keep, -math.inf)
    assert_matches(device, *inputs(2, 3, 3, 70, 90, 16), attn_mask=keep if kind == "boolean" else added)


@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_the_blocks_of_a_shared_mask_are_sorted(device, kind):
    """Full, mixed and empty blocks, rows without keys, and limits beside the mask; on a GPU more than 1024 of each."""
    size = 1100 if ON_GPU else 100
    keep = torch.rand(2, 1, size, size) < 0.6
    keep[:, :, : size // 2, size // 2 :] = False
    keep[:, :, size // 2 :, : size // 2] = True
    keep[1, :, 5] = False
    mask = keep if kind == "boolean" else torch.zeros(keep.shape).masked_fill(~keep, -math.inf)
    tensors = inputs(2, 2, 1, size, size, 16)
    for options in ({}, {"is_causal": True}, {"window": (40, 3)}):
        out, lse = assert_matches(device, *tensors, attn_mask=mask, **options)
        assert not out[1, :, 5].any()
        assert (lse[1, :, 5] == -math.inf).all()


def test_masks_and_operands_of_any_strides(device):
    q, k, v = inputs(2, 2, 2, 40, 50, 16)
    expected = assert_matches(device, q, k, v, attn_mask=(mask := torch.randn(2, 1, 50, 40)).mT)[0]
    spread = [torch.zeros(*t.shape[:3], 33)[..., 1::2].copy_(t) for t in (q, k, v)]
    assert_matches(device, *spread, attn_mask=torch.randn(40, 100)[:, ::2])
    inside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    there = [torch.empty_like(t, device=device).copy_(t) for t in inside]
    out = attention(*there, on(device, mask).mT)
    assert out.stride() == there[0].stride()
    torch.testing.assert_close(out.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_excluded_keys_do_not_leak(device, dtype):
    q, k, v = inputs(1, 2, 2, 70, 100, 32, dtype=dtype)
    keep = torch.rand(70, 100) < 0.5
    keep[:, 60:], keep[:, 0] = False, True
    added = torch.zeros(70, 100).masked_fill(~keep, -math.inf)
    for bad in (math.nan, math.inf):
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[:, :, 60:], bad_v[:, :, 60:] = bad, bad
        for options in ({"attn_mask": keep}, {"attn_mask": added}):
            there = {name: on(device, x) for name, x in options.items()}
            clean = attention(*on(device, q, k, v), **there)
            torch.testing.assert_close(attention(*on(device, q, bad_k, bad_v), **there), clean)
    bad_v = v.clone()
    bad_v[:, :, 20] = math.nan  # which queries 17 to 21 take
    out = attention(*on(device, q, k, bad_v), window=(1, 3)).cpu()
    assert out[:, :, 17:22].isnan().all()
    assert out[:, :, [*range(17), *range(22, 70)]].isfinite().all()
    assert_matches(device, q, k, torch.where(bad_v.isnan(), math.inf, bad_v), window=(1, 3))


@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_dropout_is_the_documented_function_of_the_seed(device, dropout_p):
    q, k, v = inputs(2, 4, 2, 40, 60, 16)
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, ())
    torch.manual_seed(5)
    out, lse = attention(*on(device, q, k, v), dropout_p=dropout_p, enable_gqa=True, return_lse=True)
    options = {"dropout_p": dropout_p, "enable_gqa": True, "seed": seed, "return_lse": True}
    truth, truth_lse = reference(q.double(), k.double(), v.double(), **options)
    # A weight dropped on one side only would be off by whole units.
    assert (out.cpu() - truth).abs().max() <= 1e-5
    assert (lse.cpu() - truth_lse).abs().max() <= 1e-5


def test_the_same_inputs_give_the_same_bits(device):
    tensors = on(device, *inputs(2, 4, 2, 70, 90, 32, dtype=torch.bfloat16))
    options = {"enable_gqa": True, "is_causal": True, "return_lse": True}
    assert_exact(attention(*tensors, **options), attention(*tensors, **options))
    assert_exact(attention(*tensors, enable_gqa=True, is_causal=True), attention(*tensors, **options)[0])


def test_float32_may_be_multiplied_at_lower_precision(device):
    q, k, v = inputs(1, 2, 2, 40, 60, 32)
    out = attention(*on(device, q, k, v), compute_dtype=torch.bfloat16).cpu()
    assert (out - reference(q.double(), k.double(), v.double())).abs().max() < 2**-8


def test_what_is_refused(device):
    q, k, v = on(device, *inputs(1, 2, 2, 5, 7, 8))
    for options, message in (
        ({"softcap": -1.0}, "attention: softcap is -1, but must be positive, or 0 for none"),
        ({"alibi_slopes": torch.ones(3)}, r"attention: alibi_slopes is float32\[3\], but must be \[2\] or \[1, 2\]"),
        ({"sinks": torch.ones(3)}, r"attention: sinks has shape \[3\], but must be \[2\]"),
        ({"attn_mask": torch.ones(3, 7)}, r"attention: attn_mask is \[3, 7\], but must broadcast to \[1, 2, 5, 7\]"),
        ({"attn_mask": torch.ones(5, 7, dtype=torch.int32)}, "attention: attn_mask is torch.int32, but must be one of"),
    ):
        there = {name: on(device, x) for name, x in options.items()}
        with pytest.raises(ValueError, match=message):
            attention(q, k, v, return_lse=True, **there)
    with pytest.raises(ValueError, match="key and value are float32, bfloat16, float32, but must be of one dtype"):
        attention(q, k.bfloat16(), v)


def test_why_a_call_is_not_fused(device):
    q, _, v = on(device, *inputs(1, 2, 2, 5, 7, 8))
    assert why_not_fused(q, v) is None
    assert "head size is 300" in why_not_fused(q, v.new_empty(1, 2, 7, 300))
    assert "it is int32" in why_not_fused(q.int(), v)
    assert "it is on meta" in why_not_fused(q.to("meta"), v)


def test_chosen_tiles_survive_a_file(device, tmp_path):
    from lamina.kernels.tuning import attention as tuning
    from lamina.kernels.tuning.attention import ATTENTION_KERNELS, AttentionShape, Tiles

    shapes = [AttentionShape(kernel, 128, 2, masked, 90) for kernel in ATTENTION_KERNELS for masked in (False, True)]
    for shape in shapes:
        first, *others = tuning.candidates(shape)
        assert first == tuning.attention_tiles(shape)
        assert first not in others
        assert others
    path = tmp_path / "tuned.json"
    try:
        tuning.choose(shapes[0], Tiles(64, 16, 2, 5))
        tuning.save(path)
        tuning.choose(shapes[0], None)
        assert tuning.attention_tiles(shapes[0]) != Tiles(64, 16, 2, 5)
        tuning.load(path)
        assert tuning.attention_tiles(shapes[0]) == Tiles(64, 16, 2, 5)
    finally:
        tuning.choose(shapes[0], None)
    for damaged in ("", "[]", "{}", '{"format": "another"}', path.read_text("utf-8").replace("warps", "threads")):
        path.write_text(damaged, "utf-8")
        with pytest.raises(ValueError, match="is not a file of tuned block shapes"):
            tuning.load(path)


def test_dynamo_asks_once_whether_a_gpu_has_kernels(monkeypatch):
    module = importlib.import_module("lamina.ops.attention")
    asked = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(module, "_HAS_TRITON", True)
    monkeypatch.setattr(module, "_is_ampere_or_later", lambda index: asked.append(index) or True)

    @torch.compile(backend="eager", fullgraph=True)
    def one_more(x):
        return x + 1 if module._has_kernels_for(torch.device("cuda", 0)) else x

    x = torch.zeros(3)
    assert_exact(one_more(x), x + 1)
    assert_exact(one_more(x), x + 1)
    assert asked == [0]


def _compiled(size, dtype=torch.bfloat16, mask=None, value_size=None, **options):
    def launch():
        from lamina.kernels.attention import attention as kernels

        q, v = meta(2, 8, 2048, size, dtype=dtype), meta(2, 8, 2048, value_size or size, dtype=dtype)
        there = None if mask is None else meta(*mask[0], dtype=mask[1])
        slopes = {"alibi_slopes": meta(8), "sinks": meta(8)} if options.pop("slopes", False) else {}
        kernels(q, q, v, there, v, meta(2, 8, 2048), scale=0.1, **slopes, **options)

    return launch


COMPILED = [
    *(_compiled(size, is_causal=True) for size in (64, 128, 256)),
    _compiled(128),
    _compiled(80, torch.float16, value_size=40),
    *(_compiled(size, torch.float32, is_causal=True) for size in (64, 128)),
    _compiled(128, mask=((2, 1, 2048, 2048), torch.bool)),
    _compiled(64, mask=((1, 8, 2048, 2048), torch.float32)),
    _compiled(128, window_left=1023, is_causal=True, softcap=50.0, slopes=True),
    _compiled(64, dropout_p=0.1, seed=torch.tensor(3)),
]


def _of_lengths(batch, queries, keys):
    def launch():
        from lamina.kernels.attention import attention as forward
        from lamina.kernels.attention_backward import attention_backward as gradient

        q = meta(batch, queries, 8, 64, dtype=torch.bfloat16).transpose(1, 2)
        k = meta(batch, 8, keys, 64, dtype=torch.bfloat16)
        lse, options = meta(batch, 8, queries), {"scale": 0.1, "is_causal": True}
        forward(q, k, k, None, q, lse, **options)
        gradient(q, q, k, k, q, lse, None, None, q, k, k, **options)

    return launch


COMPILED_ONCE = [[_of_lengths(2, 2048, 2048), *(_of_lengths(*s) for s in ((2, 1, 777), (1, 33, 33), (3, 511, 2050)))]]
