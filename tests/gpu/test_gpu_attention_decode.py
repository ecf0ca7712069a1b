"""attention_decode and append_to_cache_ on a GPU: the CUDA C++ kernels, and the composite of builds without them.

Without a GPU the kernels are compiled for the CPU and run by the emulator in emulator/, behind the same functions.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import SUITES
from emulator.emulated import Emulated, compile_library
from tolerances import assert_composite, assert_exact

from lamina import _C
from lamina.ops import append_to_cache_, attention_decode, quantize_rows
from lamina.reference.attention_decode import attention_decode as reference

ON_GPU = torch.cuda.is_available()
SUITE = SUITES["attention_decode"]
CASES = {case.id: case for case in SUITE.cases}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FUNCTIONS = "attention_decode_cuda", "attention_decode_append_cuda", "attention_decode_workspace_cuda"


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return None if ON_GPU else Emulated(compile_library(tmp_path_factory.mktemp("emulated")))


@pytest.fixture(autouse=True)
def emulated(library, monkeypatch, device):
    """Without a GPU, `_C` as a build for CUDA has it, run by the emulator."""
    if library is not None:
        monkeypatch.setattr(_C, "with_cuda", True)
        for name in FUNCTIONS:
            monkeypatch.setattr(_C, name, getattr(library, name), raising=False)
        monkeypatch.setattr(_C, "has_code_cuda", lambda device: True, raising=False)
    elif not _C.with_cuda:
        pytest.fail("there is a GPU, but this build of lamina has no CUDA kernels")


@pytest.fixture
def composite(emulated, monkeypatch):
    monkeypatch.setattr(_C, "with_cuda", False)


def on(device: str, t):
    """The tensor on the device, in the strides it has."""
    if not isinstance(t, torch.Tensor) or t.device.type == device:
        return t
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return whole.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def inputs(device, batch=2, queries=1, heads=4, kv_heads=2, keys=70, size=32, dtype=torch.float32, value_size=None):
    """q [B, L, H, D] and caches [B, S, Hkv, D]."""
    q = torch.randn(batch, queries, heads, size)
    k = torch.randn(batch, keys, kv_heads, size)
    v = torch.randn(batch, keys, kv_heads, size if value_size is None else value_size)
    return tuple(t.to(device=device, dtype=dtype) for t in (q, k, v))


def lengths(device, *values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def truth_of(q, k, v, n, **options):
    """Of the reference in float64, and in the dtype of the query: output and logarithm of the sum."""
    arguments = [t.cpu() for t in (q, k, v, n)]
    options = {name: t.cpu() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    return reference(arguments[0].double(), *arguments[1:], **options), reference(*arguments, **options)


def assert_right(actual, q, k, v, n, **options):
    """Within the bounds of the cases of tests/cases.py. `window` counts the token itself, as in the reference."""
    (truth, _), (eager, _) = truth_of(q, k, v, n, **options)
    values = v.float() if v.dtype is not torch.int8 else v.float() * options["v_scale"][..., None]
    largest = values[values.isfinite()].abs().max().item()
    rounding = {torch.bfloat16: 2**-9, torch.float16: 2**-12}.get(v.dtype, 2**-22)
    floor = torch.finfo(q.dtype).eps * truth[truth.isfinite()].abs().max().item() + rounding * largest
    assert_composite(actual.cpu(), eager, truth, floor=floor)


@pytest.mark.parametrize("case", CASES)
def test_the_cases_of_the_op(case, device):
    arguments = CASES[case].inputs()
    actual = torch.ops.lamina.attention_decode(*(on(device, t) for t in arguments))
    SUITE.check(actual.cpu(), arguments)


@pytest.mark.parametrize("case", CASES)
def test_the_cases_of_the_op_in_a_build_without_cuda(composite, case, device):
    arguments = CASES[case].inputs()
    actual = torch.ops.lamina.attention_decode(*(on(device, t) for t in arguments))
    SUITE.check(actual.cpu(), arguments)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("group", [1, 4, 8, 9, 16, 19])
def test_groups_of_heads(group, dtype, device):
    q, k, v = inputs(device, 1, 1, 2 * group, 2, 600, 64, torch.float32 if dtype is torch.int8 else dtype)
    scales = {}
    if dtype is torch.int8:
        (k, ks), (v, vs) = (quantize_rows(t.cpu()) for t in (k, v))
        k, v, scales = on(device, k), on(device, v), {"k_scale": on(device, ks), "v_scale": on(device, vs)}
    n = lengths(device, 577)
    assert_right(attention_decode(q, k, v, n, **scales), q, k, v, n, **scales)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize(
    ("size", "value_size"),
    [(1, 1), (8, 40), (64, 64), (80, 80), (96, 128), (100, 60), (128, 128), (192, 128), (250, 256), (256, 130)],
)
def test_head_sizes(size, value_size, dtype, device):
    floats = torch.float32 if dtype is torch.int8 else dtype
    q, k, v = inputs(device, 1, 2, 4, 2, 140, size, floats, value_size)
    scales = {}
    if dtype is torch.int8:
        (k, ks), (v, vs) = (quantize_rows(t.cpu()) for t in (k, v))
        k, v, scales = on(device, k), on(device, v), {"k_scale": on(device, ks), "v_scale": on(device, vs)}
    n = lengths(device, 139)
    assert_right(attention_decode(q, k, v, n, **scales), q, k, v, n, **scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_int8_cache_serves_queries_of_every_dtype(dtype, device):
    q, k, v = inputs(device, keys=600, dtype=dtype)
    (k, ks), (v, vs) = (quantize_rows(t.float().cpu()) for t in (k, v))
    k, v, scales = on(device, k), on(device, v), {"k_scale": on(device, ks), "v_scale": on(device, vs)}
    n = lengths(device, 600, 70)
    out = attention_decode(q, k, v, n, **scales)
    assert out.dtype == dtype
    assert_right(out, q, k, v, n, **scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_lies_behind_the_length_is_not_read(bad, queries, dtype, device):
    q, k, v = inputs(device, queries=queries, keys=600, dtype=dtype)
    for n in (5, 37, 512, 530):
        clean = attention_decode(q, k, v, lengths(device, n, 600))
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[0, n:], bad_v[0, n:] = bad, bad
        assert_exact(attention_decode(q, bad_k, bad_v, lengths(device, n, 600)), clean)


@pytest.mark.parametrize("build", ["kernels", "composite"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_key_touches_only_the_queries_that_take_it(bad, dtype, build, device, request):
    if build == "composite":
        request.getfixturevalue("composite")
    q, k, v = inputs(device, queries=6, keys=40, dtype=dtype)
    n = lengths(device, 40, 40)
    clean = attention_decode(q, k, v, n, window=7)
    bad_v = v.clone()
    bad_v[:, 30] = bad  # queries are tokens 34 to 39; those up to 37 see token 30
    out = attention_decode(q, k, bad_v, n, window=7)
    assert not out[:, :4].isfinite().any()
    assert_right(out[:, 4:], q[:, 4:], k, v, n, window=8)
    bad_k = k.clone()
    bad_k[:, 37:] = math.nan
    out = attention_decode(q, bad_k, v, n, window=7)
    assert out[:, 3:].isnan().all()
    assert_exact(out[:, :3], clean[:, :3])


@pytest.mark.parametrize("build", ["kernels", "composite"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("keys", [200, 700])
def test_the_logarithm_of_the_sum(queries, keys, build, device, request):
    if build == "composite":
        request.getfixturevalue("composite")
    q, k, v = inputs(device, queries=queries, keys=keys)
    n, sinks = lengths(device, keys, queries - 1), torch.randn(4, device=device)
    slopes = torch.rand(2, 4, device=device)
    for options in ({}, {"sinks": sinks}, {"window": 20}, {"softcap": 3.0}, {"alibi_slopes": slopes}):
        ours = {"window": (19, 0)} if "window" in options else options
        out, lse = attention_decode(q, k, v, n, return_lse=True, **ours)
        assert_exact(out, attention_decode(q, k, v, n, **ours))
        (truth, lse_truth), (eager, lse_eager) = truth_of(q, k, v, n, **options)
        assert_composite(out.cpu(), eager, truth, floor=1e-6)
        assert_composite(lse.cpu(), lse_eager, lse_truth, floor=2e-6 * 7)
        if "sinks" not in options and queries > 1:  # the first query of sequence 1 is token -1
            assert not out[1, 0].any()
            assert lse[1, :, 0].eq(-math.inf).all()


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_option_at_once(dtype, queries, device):
    """Blocks, a window, caps, slopes of each sequence, sinks; lengths that end in the middle of everything."""
    q, k, v = inputs(device, 3, queries, 6, 2, 1024, 72, dtype)
    n = lengths(device, 1000, 3, 515)
    options = {
        "softcap": 4.0,
        "alibi_slopes": torch.rand(3, 6, device=device) / 16,
        "sinks": torch.randn(6, device=device),
        "scale": 0.2,
    }
    out = attention_decode(q, k, v, n, window=(699, 0), **options)
    assert_right(out, q, k, v, n, window=700, **options)
    paged, table = blocks_of((k, v), 48, device)
    assert_exact(attention_decode(q, *paged, n, block_table=table, window=(699, 0), **options), out)


def blocks_of(caches, block: int, device: str):
    """The same tokens in shuffled blocks, the last of which are filled up with NaN, and the table of them."""
    batch, keys = caches[0].shape[:2]
    each = -(-keys // block)
    table = torch.randperm(batch * each + 3)[: batch * each].to(torch.int32).view(batch, each)
    paged = []
    for cache in caches:
        padded = torch.full((batch, each * block, *cache.shape[2:]), math.nan if cache.is_floating_point() else 77)
        padded[:, :keys] = cache.cpu()
        blocks = torch.full((batch * each + 3, block, *cache.shape[2:]), math.nan if cache.is_floating_point() else 77)
        blocks[table.flatten().long()] = padded.reshape(batch * each, block, *cache.shape[2:])
        paged.append(blocks.to(device=device, dtype=cache.dtype))
    return paged, table.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 16, 37, 128])
def test_blocks_give_the_same_bits_as_one_cache(block, dtype, device):
    q, k, v = inputs(device, keys=block * 5, dtype=dtype)
    n = lengths(device, 5 * block, min(5 * block, 55))
    paged, table = blocks_of((k, v), block, device)
    table[1, -(-int(n[1]) // block) :] = -1  # entries behind the sequence are not looked at
    assert_exact(attention_decode(q, *paged, n, block_table=table), attention_decode(q, k, v, n))


def test_the_order_of_threads_changes_nothing(library, device):
    if library is None:
        pytest.skip("a GPU has its own order")
    q, k, v = inputs(device, queries=3, keys=600, size=64, dtype=torch.bfloat16)
    q32, k32, v32 = inputs(device, queries=3, keys=600, size=36)
    n = lengths(device, 600, 411)

    def both():
        return attention_decode(q, k, v, n, return_lse=True), attention_decode(q32, k32, v32, n, return_lse=True)

    expected = both()
    library.take_turns_backwards(True)
    try:
        actual = both()
    finally:
        library.take_turns_backwards(False)
    for a, e in zip(actual, expected, strict=True):
        assert_exact(a, e)


def test_lengths_and_blocks_that_are_not_there_stay_within_the_cache(device):
    q, k, v = inputs(device, keys=64)
    assert_exact(
        attention_decode(q, k, v, lengths(device, 1000, -7)), attention_decode(q, k, v, lengths(device, 64, 0))
    )
    paged, table = blocks_of((k, v), 16, device)
    wild = table.clone()
    wild[0, 1], wild[1, 2] = 2**31 - 1, -(2**31)
    bounded = wild.clamp(0, len(paged[0]) - 1)
    n = lengths(device, 64, 64)
    paged = [t.nan_to_num(0.5) for t in paged]
    assert_exact(attention_decode(q, *paged, n, block_table=wild), attention_decode(q, *paged, n, block_table=bounded))


def test_lengths_are_numbers_or_tensors_of_either_kind(device):
    q, k, v = inputs(device)
    expected = attention_decode(q, k, v, lengths(device, 41, 41))
    assert_exact(attention_decode(q, k, v, 41), expected)
    assert_exact(attention_decode(q, k, v, torch.tensor([41, 41], device=device)), expected)
    assert_exact(attention_decode(q, k, v, lengths(device, 41, 0, 41, 0)[::2]), expected)


def test_a_long_sequence_beside_short_ones(device):
    """Many more parts than the short ones have tiles."""
    q, k, v = inputs(device, 3, 1, 2, 1, 9000, 16, torch.bfloat16)
    n = lengths(device, 1, 9000, 0)
    out, lse = attention_decode(q, k, v, n, return_lse=True)
    assert_right(out, q, k, v, n)
    assert not out[2].any()
    assert lse[2].eq(-math.inf).all()


@pytest.mark.parametrize("changed", ["k_cache", "cache_seqlens", "softcap", "sinks"])
def test_bad_input_is_refused(changed, device):
    q, k, v = inputs(device)
    arguments = {"k_cache": k, "cache_seqlens": lengths(device, 7, 70)}
    arguments[changed] = {
        "k_cache": k[..., :16],
        "cache_seqlens": torch.ones(2, device=device),
        "softcap": -1.0,
        "sinks": torch.zeros(2, device=device),
    }[changed]
    message = {
        "k_cache": r"k_cache is float32\[2, 70, 2, 16\], but must have the head size of q, 32",
        "cache_seqlens": "cache_seqlens is float32, but must be int32 or int64",
        "softcap": "softcap is -1, but must be positive",
        "sinks": r"sinks has shape \[2\], but must be \[4\]",
    }[changed]
    with pytest.raises(ValueError, match=f"attention_decode: {message}"):
        attention_decode(q, v_cache=v, **arguments)


# -- append_to_cache_


@pytest.mark.parametrize("build", ["kernels", "composite"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [0, 16])
def test_append_writes_the_new_tokens_and_nothing_else(dtype, block, build, device, request):
    if build == "composite":
        request.getfixturevalue("composite")
    _, k, v = inputs(device, keys=48, dtype=dtype)
    _, new_k, new_v = inputs(device, keys=5, dtype=dtype)
    n = lengths(device, 12, 40)
    table = torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32, device=device) if block else None

    def stored(cache):
        if table is None:
            return cache.clone()
        out = torch.empty(table.numel(), block, *cache.shape[2:], dtype=cache.dtype, device=device)
        out[table.flatten().long()] = cache.reshape(table.numel(), block, *cache.shape[2:])
        return out

    caches = [stored(t) for t in (k, v)]
    append_to_cache_(*caches, n, new_k.mT.contiguous().mT, new_v, block_table=table)
    for cache, before, new in zip(caches, (k, v), (new_k, new_v), strict=True):
        expected = before.clone()
        for b in range(2):
            expected[b, n[b] : n[b] + 5] = new[b]
        assert_exact(cache, stored(expected))
    assert n.tolist() == [12, 40]


@pytest.mark.parametrize("build", ["kernels", "composite"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("size", [32, 33, 250])
def test_append_to_an_int8_cache_quantizes_each_token_and_head(size, dtype, build, device, request):
    if build == "composite":
        request.getfixturevalue("composite")
    caches = [torch.zeros(2, 2, 20, size, dtype=torch.int8, device=device).transpose(1, 2) for _ in range(2)]
    scales = [torch.zeros(2, 20, 2, device=device) for _ in range(2)]
    _, k, v = inputs(device, keys=3, dtype=dtype, size=size)
    k[0, 0, 0] = 0.0
    k[0, 1, 0, 3], v[1, 2, 1, 0] = math.nan, -math.inf
    k[1, 0] *= 1e-37
    append_to_cache_(*caches, 6, k, v, k_scale=scales[0], v_scale=scales[1])
    for cache, scale, t in zip(caches, scales, (k, v), strict=True):
        codes, expected = quantize_rows(t.reshape(-1, size).cpu())
        assert_exact(cache[:, 6:9].reshape(-1, size).cpu(), codes)
        assert_exact(scale[:, 6:9].reshape(-1).cpu(), expected)
        assert not cache[:, :6].any()
        assert not cache[:, 9:].any()


@pytest.mark.parametrize("build", ["kernels", "composite"])
def test_of_what_does_not_fit_nothing_is_written(build, device, request):
    if build == "composite":
        request.getfixturevalue("composite")
    _, k, v = inputs(device, keys=3)
    caches = [torch.zeros(2, 8, 2, 32, device=device) for _ in range(2)]
    append_to_cache_(*caches, lengths(device, 6, 5), k, v)
    for cache, new in zip(caches, (k, v), strict=True):
        assert not cache[0].any()
        assert not cache[1, :5].any()
        assert_exact(cache[1, 5:], new[1])
    append_to_cache_(*(t.zero_() for t in caches), lengths(device, -1, 6), k, v)
    table = torch.tensor([[7], [-1]], dtype=torch.int32, device=device)
    append_to_cache_(*caches, lengths(device, 0, 0), k, v, block_table=table)
    assert not caches[0].any()
    assert not caches[1].any()


def test_generation_step_by_step(device):
    q, k, v = inputs(device, keys=20, dtype=torch.bfloat16)
    caches = [torch.full_like(t, math.nan) for t in (k, v)]
    for n in range(20):
        append_to_cache_(*caches, n, k[:, n : n + 1], v[:, n : n + 1])
        assert_exact(attention_decode(q, *caches, n + 1), attention_decode(q, k, v, n + 1))


# -- the emulator, and what only a GPU has

SANITIZED = """
import sys
import torch
from lamina.ops.attention_decode import _attention_decode  # registers the op
from emulator.emulated import Emulated
from cases import SUITES

emulated = Emulated(sys.argv[1])
generator = torch.Generator().manual_seed(0)
for case in SUITES["attention_decode"].cases:
    q, k, v, n, table, scale, *rest = case.inputs()
    if q.numel() > 20_000:
        continue
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[0], q.shape[2], q.shape[1]).float()
    workspace = torch.empty(emulated.attention_decode_workspace_cuda(q, k, v, table))
    emulated.attention_decode_cuda(q, k, v, n, table, scale or 1.0, *rest, out, lse, workspace)
for dtype in (torch.float32, torch.bfloat16, torch.int8):
    floats = torch.float32 if dtype is torch.int8 else dtype
    caches = [torch.zeros(3, 5, 2, 33, dtype=dtype) for _ in range(2)]
    scales = [torch.zeros(3, 5, 2) if dtype is torch.int8 else None for _ in range(2)]
    k, v = (torch.randn(2, 5, 2, 33).to(floats) for _ in range(2))
    table = torch.tensor([[2, 0], [-5, 99]], dtype=torch.int32)
    for n in (-1, 0, 5, 6):
        n = torch.full((2,), n)
        emulated.attention_decode_append_cuda(*caches, n, k, v, table, *scales)
print("clean")
"""


def test_subprocess_the_address_sanitizer_finds_nothing(tmp_path):
    library = compile_library(tmp_path, "-fsanitize=address", "-fno-omit-frame-pointer", "-g1")
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, library],
        env={
            **os.environ,
            "LD_PRELOAD": runtime.strip(),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, *filter(None, [os.environ.get("PYTHONPATH")])))),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "clean", done.stderr[-3000:]


@pytest.mark.skipif(not ON_GPU, reason="only a GPU captures graphs")
def test_a_graph_serves_lengths_that_come_later(device):
    q, k, v = inputs(device, keys=2000, size=128, dtype=torch.bfloat16)
    new_k, new_v = k[:, :1].clone(), v[:, :1].clone()
    n = lengths(device, 5, 5)
    append_to_cache_(k, v, n, new_k, new_v)  # kernels are loaded when they first run, which a capture may forbid
    attention_decode(q, k, v, n + 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append_to_cache_(k, v, n, new_k, new_v)
        out = attention_decode(q, k, v, n + 1)
    for values in ((70, 1999), (1, 300)):
        n.copy_(lengths(device, *values))
        graph.replay()
        assert_exact(out, attention_decode(q, k, v, n + 1))


@pytest.mark.skipif(not ON_GPU, reason="only a GPU is waited for")
@pytest.mark.parametrize("build", ["kernels", "composite"])
def test_nothing_waits_for_the_device(build, device, request):
    if build == "composite":
        request.getfixturevalue("composite")
    q, k, v = inputs(device, keys=600, dtype=torch.bfloat16)
    paged, table = blocks_of((k, v), 16, device)
    n = lengths(device, 500, 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_decode(q, k, v, n, return_lse=True)
        attention_decode(q, *paged, n, block_table=table)
        append_to_cache_(k, v, n, k[:, :1].clone(), v[:, :1].clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not ON_GPU, reason="takes 5 GiB and the time of as many bytes")
def test_a_cache_of_more_than_2_31_elements(device):
    keys = 2**31 // 128 // 64 + 1000
    k, v = (torch.zeros(1, keys, 64, 128, dtype=torch.int8, device=device) for _ in range(2))
    scales = torch.ones(1, keys, 64, device=device)
    q = torch.randn(1, 1, 64, 128, device=device)
    v[0, -1] = 100
    out = attention_decode(q, k, v, keys, k_scale=scales, v_scale=scales, window=(1, 0))
    assert out.eq(50).all()
