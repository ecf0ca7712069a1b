"""Every op on every instruction set of this machine: the same answers, integers bit for bit, and proof of what ran."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import PAIRS, SUITES
from test_every_op import assert_same, first_tensor
from tolerances import assert_exact

import lamina
from lamina import _C

KERNELS = Path(__file__).parents[1] / "csrc" / "cpu" / "kernels"


def isa_ladder() -> list[str]:
    """All instruction sets lamina knows, rising, from isa.def."""
    text = (KERNELS.parent / "isa.def").read_text("utf-8")
    return re.findall(r"^ISA_ROW\((\w+),", text, flags=re.MULTILINE)


def portable_isas() -> list[str]:
    """Those that have copies of the portable kernels."""
    text = (KERNELS.parent / "isa.def").read_text("utf-8")
    return re.findall(r'^ISA_ROW\((\w+), "[^"]*", compiled,', text, flags=re.MULTILINE)


def expected_isa(table: str, active: str) -> str:
    """Which variant of a table runs: the highest hand-written one up to `active`, else the highest portable one."""
    ladder = isa_ladder()
    hand_written = [
        path.name.split(".")[1]
        for path in KERNELS.glob("*.*.cpp")
        if f"REGISTER_KERNEL({table}," in path.read_text("utf-8")
    ]
    below = [isa for isa in hand_written if ladder.index(isa) <= ladder.index(active)]
    portable = [isa for isa in portable_isas() if ladder.index(isa) <= ladder.index(active)]
    return max(below or portable, key=ladder.index)


OWN = [pair for pair in PAIRS if pair[0].own_kernel]
OWN_SUITES = {op: suite for op, suite in SUITES.items() if suite.own_kernel}

# What is copied as bytes.
ANY_DTYPE = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool),
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
)

# The table whose kernel each op looks up last, by the dtype of its first input.
LAST_TABLE = {
    ("int8_linear", torch.float32): "int8_gemm_table",
    ("int8_linear", torch.bfloat16): "int8_gemm_table",
    ("int8_linear", torch.int8): "int8_gemm_table",
    ("int8_conv2d", torch.float32): "int8_conv_table",
    ("int8_conv2d", torch.bfloat16): "int8_conv_table",
    ("int8_conv2d", torch.int8): "int8_conv_table",
    ("int8_pool2d", torch.int8): "int8_pool_table",
    ("quantize_rows", torch.float32): "quantize_rows_f32_table",
    ("quantize_rows", torch.bfloat16): "quantize_rows_bf16_table",
    ("attention", torch.float32): "attention_f32_table",
    ("attention", torch.bfloat16): "attention_bf16_table",
    ("attention", torch.float16): "attention_f16_table",
    ("attention_varlen", torch.float32): "attention_f32_table",
    ("attention_varlen", torch.bfloat16): "attention_bf16_table",
    ("attention_varlen", torch.float16): "attention_f16_table",
    ("attention_decode", torch.float32): "attention_decode_f32_table",
    ("attention_decode", torch.bfloat16): "attention_decode_bf16_table",
    ("attention_decode", torch.float16): "attention_decode_f16_table",
    ("attention_backward", torch.float32): "attention_backward_f32_table",
    ("attention_backward", torch.bfloat16): "attention_backward_bf16_table",
    ("attention_backward", torch.float16): "attention_backward_f16_table",
    ("attention_backward", torch.float64): "attention_backward_f64_table",
    ("conv2d", torch.float32): "conv_direct_table",
    ("conv2d", torch.bfloat16): "conv_direct_table",
    ("embedding", torch.int32): "embedding_int32_table",
    ("embedding", torch.int64): "embedding_int64_table",
    ("group_norm", torch.float32): "group_norm_f32_table",
    ("group_norm", torch.bfloat16): "group_norm_bf16_table",
    ("gru", torch.float32): "rnn_step_f32_table",
    ("gru", torch.bfloat16): "rnn_step_bf16_table",
    ("int8_gru", torch.float32): "rnn_step_int8_table",
    ("int8_gru", torch.bfloat16): "rnn_step_int8_table",
    ("int8_lstm", torch.float32): "rnn_step_int8_table",
    ("int8_lstm", torch.bfloat16): "rnn_step_int8_table",
    ("linear", torch.float32): "linear_gemm_table",
    ("linear", torch.bfloat16): "linear_gemm_table",
    ("lstm", torch.float32): "rnn_step_f32_table",
    ("lstm", torch.bfloat16): "rnn_step_bf16_table",
    ("rnn_relu", torch.float32): "rnn_step_f32_table",
    ("rnn_relu", torch.bfloat16): "rnn_step_bf16_table",
    ("rnn_tanh", torch.float32): "rnn_step_f32_table",
    ("rnn_tanh", torch.bfloat16): "rnn_step_bf16_table",
    ("sparse_int8_linear", torch.float32): "sparse_int8_table",
    ("sparse_int8_linear", torch.bfloat16): "sparse_int8_table",
    ("sparse_int8_linear", torch.int8): "sparse_int8_table",
    ("sparse_conv2d", torch.float32): "sparse_gemm_f32_table",
    ("sparse_conv2d", torch.bfloat16): "sparse_gemm_bf16_table",
    ("sparse_linear", torch.float32): "sparse_gemm_f32_table",
    ("sparse_linear", torch.bfloat16): "sparse_gemm_bf16_table",
    ("token_panels", torch.float32): "panel_of_rows_f32_table",
    ("token_panels", torch.bfloat16): "panel_of_rows_bf16_table",
    ("weight_only_linear", torch.float32): "weight_only_gemm_f32_table",
    ("weight_only_linear", torch.bfloat16): "weight_only_gemm_bf16_table",
    ("layer_norm", torch.float32): "norm_rows_f32_table",
    ("layer_norm", torch.bfloat16): "norm_rows_bf16_table",
    ("rms_norm", torch.float32): "norm_rows_f32_table",
    ("reduce", torch.float32): "reduce_f32_table",
    ("reduce", torch.bfloat16): "reduce_bf16_table",
    ("rms_norm", torch.bfloat16): "norm_rows_bf16_table",
    ("elementwise", torch.float32): "elementwise_table",
    ("elementwise", torch.bfloat16): "elementwise_table",
    ("elementwise", torch.bool): "elementwise_table",
    ("pool2d", torch.float32): "pool_table",
    ("pool2d", torch.bfloat16): "pool_table",
    **{(op, dtype): "copy_table" for op in ("copy", "concatenate") for dtype in ANY_DTYPE},
    ("softmax", torch.float32): "softmax_f32_table",
    ("softmax", torch.bfloat16): "softmax_bf16_table",
}


def call(suite, inputs):
    return getattr(torch.ops.lamina, suite.op).default(*inputs)


def test_isas_rise_and_start_at_the_baseline():
    isas = _C.available_isas()
    assert isas[0] == "generic"
    ladder = isa_ladder()
    assert [ladder.index(isa) for isa in isas] == sorted(ladder.index(isa) for isa in isas)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux tells the processor's features in /proc/cpuinfo")
def test_isas_are_those_of_the_processor():
    """The kernel lists a feature only if it also saves the registers, which is what lamina must find by itself."""
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)[1].split())
    core = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needs = {
        "generic": set(),
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": core,
        "avx512vnni": core | {"avx512_vnni"},
        "avx512bf16": core | {"avx512_vnni", "avx512_bf16"},
    }
    assert set(needs) == set(isa_ladder())
    assert _C.available_isas() == [isa for isa in isa_ladder() if needs[isa] <= flags]


@pytest.mark.parametrize(("suite", "case"), OWN, ids=[f"{suite.op}-{case.id}" for suite, case in OWN])
def test_matches_float64(suite, case, isa, seed):
    inputs = case.inputs(seed)
    with lamina.force_isa(isa):
        actual = call(suite, inputs)
        ran = _C.last_isa()
    suite.check(actual, inputs)
    if not case.tags & {"empty"}:
        assert ran == expected_isa(LAST_TABLE[suite.op, first_tensor(inputs).dtype], isa)


@pytest.mark.parametrize("suite", OWN_SUITES.values(), ids=OWN_SUITES)
def test_every_isa_repeats_itself_for_every_thread_count(suite, isa, seed):
    for case in suite.cases:
        if "threads" not in case.tags:
            continue
        inputs = case.inputs(seed)
        with lamina.force_isa(isa):
            torch.set_num_threads(1)
            alone = call(suite, inputs)
            torch.set_num_threads(2)
            assert_same(call(suite, inputs), alone, case.id)


def test_last_isa_is_where_the_rule_says():
    """The rule itself, spelled out for a kernel with variants and for one without."""
    expected = {"generic": "generic", "avx2": "avx2", "avx512": "avx512", "avx512vnni": "avx512vnni"}
    expected["avx512bf16"] = "avx512vnni"  # hand-written for VNNI, and BF16 adds nothing to it
    packed = lamina.ops.pack_int8_weight(torch.ones(3, 5))
    for isa in _C.available_isas():
        with lamina.force_isa(isa):
            lamina.ops.int8_linear(torch.ones(2, 5), packed)
            assert _C.last_isa() == expected[isa]
            lamina.ops.layer_norm(torch.ones(2, 5), (5,))
            assert _C.last_isa() == {"generic": "generic", "avx2": "avx2"}.get(isa, "avx512")


# -- integers are exact


def exact_call(x_codes: torch.Tensor, w_codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """int8_linear with both scales 1 and no bias: its outputs are the int32 sums, rounded once.

    Every row of x holds a 127 (its largest), so that its scale is 1 and its codes are its values.
    """
    assert x_codes.abs().amax(dim=1).eq(127).all()
    packed = lamina.ops.pack_int8_weight(w_codes.to(torch.int8), torch.ones(w_codes.shape[0]))
    return lamina.ops.int8_linear(x_codes.to(dtype), packed)


def exact_sums(x_codes: torch.Tensor, w_codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    sums = x_codes.long() @ w_codes.long().T
    assert sums.abs().max() < 2**31
    return sums.to(torch.float32).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (7, 5, 17), (13, 64, 65), (5, 333, 130), (6, 4096, 64), (1, 3001, 40)]
)
def test_integer_sums_are_exact(isa, m, k, n, dtype, generator):
    x = torch.randint(-127, 128, (m, k), generator=generator)
    x[:, 0] = 127
    w = torch.randint(-127, 128, (n, k), generator=generator)
    with lamina.force_isa(isa):
        assert_exact(exact_call(x, w, dtype), exact_sums(x, w, dtype), isa)


@pytest.mark.parametrize("x_sign", [1, -1])
@pytest.mark.parametrize("w_sign", [1, -1])
@pytest.mark.parametrize("k", [1, 2, 64, 4099])
def test_extremes_do_not_saturate(isa, x_sign, w_sign, k):
    """vpmaddubsw saturates pair sums at 32767: 255 * 127 * 2 is 64770 (pytorch#136746)."""
    x = torch.full((9, k), 127 * x_sign)
    w = torch.full((70, k), 127 * w_sign)
    with lamina.force_isa(isa):
        assert_exact(exact_call(x, w), exact_sums(x, w), isa)


def test_alternating_extremes(isa):
    """Pairs of equal and of opposite sign, in every position of a group of four."""
    k = 260
    i = torch.arange(k)
    patterns = torch.stack([torch.where((i >> shift) & 1 == 0, 127, -127) for shift in range(6)])
    with lamina.force_isa(isa):
        assert_exact(exact_call(patterns, patterns.repeat(4, 1)), exact_sums(patterns, patterns.repeat(4, 1)), isa)


LARGEST_K = (2**31 - 1) // (127 * 127)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_fits(isa, sign):
    """At the largest in_features that packing takes, the sum of extremes is just below 2^31."""
    x = torch.full((2, LARGEST_K), 127)
    w = torch.full((3, LARGEST_K), 127 * sign)
    with lamina.force_isa(isa):
        assert_exact(exact_call(x, w), exact_sums(x, w), isa)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_bit_equal_on_every_isa(dtype, generator):
    """Rounding of activations, ties included: unit weights read the codes back, the same ones on every ISA."""
    k = 97
    x = torch.randn(40, k, generator=generator)
    x[:10] = torch.randint(-127, 127, (10, k), generator=generator) + 0.5  # ties
    x[:10, 0] = 127
    x = x.to(dtype)
    packed = lamina.ops.pack_int8_weight(torch.eye(k, dtype=torch.int8), torch.ones(k))
    outputs = {}
    for isa in _C.available_isas():
        with lamina.force_isa(isa):
            outputs[isa] = lamina.ops.int8_linear(x, packed)
    codes, scale = lamina.reference.quantize_rows.quantize_rows(x)
    expected = (codes.float() * scale[:, None]).to(dtype)
    for isa, output in outputs.items():
        assert_exact(output, expected, isa)


def test_rounding_is_half_to_even(isa):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 126.5, -126.5]])
    packed = lamina.ops.pack_int8_weight(torch.eye(10, dtype=torch.int8), torch.ones(10))
    with lamina.force_isa(isa):
        codes = lamina.ops.int8_linear(x, packed)
    assert codes.tolist() == [[127, 0, 2, 2, 4, 0, -2, -2, 126, -126]]


# -- forcing an instruction set


def test_force_isa_nests_and_restores():
    before = _C.active_isa()
    with lamina.force_isa("generic"):
        assert _C.active_isa() == lamina.info()["isa"] == "generic"
        with lamina.force_isa(_C.available_isas()[-1]):
            assert _C.active_isa() == _C.available_isas()[-1]
        assert _C.active_isa() == "generic"
    assert _C.active_isa() == before


def test_force_isa_restores_after_an_exception():
    before = _C.active_isa()
    with pytest.raises(RuntimeError, match="inside"), lamina.force_isa("generic"):
        raise RuntimeError("inside")
    assert _C.active_isa() == before


@pytest.mark.parametrize("name", ["sse2", "AVX2", "", "avx512 ", "neon"])
def test_unknown_isa_changes_nothing(name):
    with lamina.force_isa("generic"):
        available = re.escape(", ".join(_C.available_isas()))
        with (
            pytest.raises(ValueError, match=f"^ISA '{name}' is unknown; available: {available}$"),
            lamina.force_isa(name),
        ):
            pytest.fail("the block must not run")
        assert _C.active_isa() == "generic"


def test_isa_must_be_text():
    with pytest.raises(TypeError), lamina.force_isa(512):
        pytest.fail("the block must not run")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_subprocess_environment_sets_the_isa():
    code = "import lamina, torch; print(lamina.info()['isa']); lamina.ops.int8_linear(torch.ones(1, 4), "
    code += "lamina.ops.pack_int8_weight(torch.ones(2, 4))); print(lamina._C.last_isa())"
    done = run_python(code, LAMINA_ISA="generic")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["generic", "generic"]


def test_subprocess_environment_with_an_unknown_isa():
    done = run_python("import lamina", LAMINA_ISA="avx1024")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"ValueError: LAMINA_ISA: ISA 'avx1024' is unknown; available: {', '.join(_C.available_isas())}"
