"""sparse_linear: what holds beside "close to the reference", and every way to call it wrongly."""

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_exact, assert_lossy
from torch.nn import functional as F

import lamina
from lamina import _C
from lamina.ops import pack_sparse_weight, sparse_info, sparse_linear, unpack_sparse_weight
from lamina.ops.int8_linear import ACTIVATIONS
from lamina.ops.sparse_linear import PATTERNS
from lamina.reference.int8_linear import ACTIVATIONS as PLAIN
from lamina.reference.sparse_linear import kept_blocks

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
PATTERN = pytest.mark.parametrize("pattern", PATTERNS)


def pruned(n: int, k: int, density: float, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, k, generator=generator) * (torch.rand(n, k, generator=generator) < density)


# -- packing


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    n=st.integers(0, 140),
    k=st.integers(0, 300),
    pattern=st.sampled_from(PATTERNS),
    density=st.sampled_from([0, 0.05, 0.5, 1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_pack_and_unpack_are_inverse(n, k, pattern, density, dtype, seed):
    weight = pruned(n, k, density, torch.Generator().manual_seed(seed)).to(dtype)
    packed = pack_sparse_weight(weight, pattern)
    assert (unpack_sparse_weight(packed) == weight).all()
    info = sparse_info(packed.data)
    rows = 1 if pattern == "unstructured" else int(pattern[0])
    blocks = kept_blocks(weight, pattern)[::rows].sum()
    assert info == (pattern, dtype, n, k, blocks, (weight != 0).sum())


@PATTERN
def test_packing_takes_any_strides(pattern, generator):
    weight = pruned(70, 133, 0.3, generator)
    plain = pack_sparse_weight(weight, pattern).data
    for layout in ("transposed", "misaligned", "sliced", "every_second"):
        assert_exact(pack_sparse_weight(cases.LAYOUTS[layout](weight), pattern).data, plain, layout)
    torch.set_num_threads(1)
    assert_exact(pack_sparse_weight(weight, pattern).data, plain, "one thread")


def test_packed_bytes(generator):
    """Six bytes a value where it has an index of its own, four and a half where four share one."""
    weight = pruned(768, 3072, 0.1, generator)
    for pattern, most in (("unstructured", 6.4), ("4x1", 4.6)):
        packed = pack_sparse_weight(weight, pattern)
        values = sparse_info(packed.data).blocks * (1 if pattern == "unstructured" else 4)
        assert packed.data.numel() <= most * values


def test_density_counts_values():
    weight = torch.zeros(8, 10)
    weight[0, 3] = weight[5, 3] = -2
    info = sparse_info(pack_sparse_weight(weight, "4x1").data)
    assert (info.blocks, info.nonzeros, info.density) == (2, 2, 2 / 80)
    assert sparse_info(pack_sparse_weight(torch.zeros(0, 10)).data).density == 0


# -- arithmetic


@PATTERN
@DTYPES
def test_equals_the_masked_dense_layer(pattern, dtype, isa, generator):
    x, weight = torch.randn(70, 300, generator=generator), pruned(90, 300, 0.2, generator)
    bias = torch.randn(90, generator=generator)
    with lamina.force_isa(isa):
        y = sparse_linear(x.to(dtype), pack_sparse_weight(weight, pattern), bias)
    truth = F.linear(x.to(dtype).double(), weight.double(), bias.double())
    assert_lossy(y, truth, min_sqnr_db=130 if dtype is torch.float32 else 50)


@PATTERN
@pytest.mark.parametrize("m", [1, 3, 40])
def test_all_zeros_and_no_zeros(pattern, m, isa, generator):
    x, bias = torch.randn(m, 50, generator=generator), torch.randn(20, generator=generator)
    with lamina.force_isa(isa):
        assert_exact(sparse_linear(x, pack_sparse_weight(torch.zeros(20, 50), pattern), bias), bias.expand(m, 20))
        eye = pack_sparse_weight(torch.eye(50), pattern)
        assert_exact(sparse_linear(x, eye), x)
        full = sparse_linear(x, pack_sparse_weight(torch.ones(20, 50), pattern))
    assert_lossy(full, x.double().sum(1, keepdim=True).expand(m, 20), min_sqnr_db=120)


@PATTERN
@pytest.mark.parametrize("m", [2, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite(pattern, m, bad, isa, generator):
    """The other rows do not notice, nor do channels whose weights there are not stored."""
    x, weight = torch.randn(m, 40, generator=generator), pruned(20, 40, 0.3, generator)
    weight[8:12, 17] = 0
    packed = pack_sparse_weight(weight, pattern)
    with lamina.force_isa(isa):
        clean = sparse_linear(x, packed)
        x[1, 17] = bad
        y = sparse_linear(x, packed)
    stored = kept_blocks(weight, pattern)[:, 17]
    assert not y[1, stored].isfinite().any()
    assert_exact(y[1, ~stored], clean[1, ~stored])
    assert_exact(y[[0, *range(2, m)]], clean[[0, *range(2, m)]])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    lead=st.lists(st.integers(0, 7), min_size=0, max_size=3),
    k=st.integers(0, 300),
    n=st.integers(0, 140),
    pattern=st.sampled_from(PATTERNS),
    density=st.sampled_from([0.02, 0.3, 1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    values=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "misaligned", "sliced", "every_second", "columns_repeated"]),
    bias=st.sampled_from([None, torch.float32, torch.bfloat16]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_strides(lead, k, n, pattern, density, dtype, values, layout, bias, activation, seed):
    if layout == "columns_repeated" and k == 0:
        layout = "contiguous"
    options = {"dtype": dtype, "values": values, "layout": layout, "bias": bias, "activation": activation}
    case = cases._sparse_linear_case(*lead, k=k, n=n, pattern=pattern, density=density, **options)
    inputs = case.inputs(seed)
    cases.sparse_linear_check(torch.ops.lamina.sparse_linear(*inputs), inputs)


# -- gradients


@PATTERN
@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
def test_gradient_is_that_of_the_dense_layer(pattern, activation, generator):
    x = torch.randn(5, 3, 140, generator=generator, requires_grad=True)
    bias = torch.randn(21, generator=generator, requires_grad=True)
    weight, out = pruned(21, 140, 0.3, generator), torch.randn(5, 3, 21, generator=generator)
    sparse_linear(x, pack_sparse_weight(weight, pattern), bias, activation=activation).backward(out)
    ours = x.grad, bias.grad
    x64, bias64 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    PLAIN[activation or "none"](F.linear(x64, weight.double(), bias64)).backward(out.double())
    for mine, truth in zip(ours, (x64.grad, bias64.grad), strict=True):
        assert_lossy(mine, truth, min_sqnr_db=100)


# -- refusals


def one_sentence(error) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert ": " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4),), r"weight has shape \[4\], but must be \[N, K\]"),
        ((torch.ones(4, 3, device="meta"),), "weight is on meta, but sparse kernels run on the CPU"),
        ((torch.ones(4, 3, dtype=torch.float64),), "weight is float64, but must be float32 or bfloat16"),
        ((torch.ones(4, 3), "1x4"), "pattern '1x4' is unknown; use one of unstructured, 2x1, 4x1"),
        ((torch.ones(4, 3), ""), "pattern '' is unknown"),
    ],
)
def test_refuses_to_pack(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pack_sparse_weight(*arguments)
    one_sentence(error)


@pytest.mark.parametrize(
    ("x", "bias", "activation", "message"),
    [
        (torch.ones(2, 41), None, None, "x has 41 features, but packed_weight was packed for 40"),
        (torch.ones(2, 40, dtype=torch.float64), None, None, "x is float64, but must be float32 or bfloat16"),
        (torch.tensor(1.0), None, None, "x is a scalar"),
        (torch.ones(2, 40), torch.ones(19), None, r"bias has shape \[19\], but must be \[20\]"),
        (torch.ones(2, 40), None, "softsign", "activation 'softsign' is unknown; use none, relu, relu6, gelu"),
    ],
)
def test_refuses_wrong_input(x, bias, activation, message):
    with pytest.raises(ValueError, match=f"sparse_linear: {message}") as error:
        sparse_linear(x, pack_sparse_weight(torch.ones(20, 40)), bias, activation=activation)
    one_sentence(error)


def test_refuses_a_wrong_output():
    data = pack_sparse_weight(torch.ones(20, 40)).data
    with pytest.raises(ValueError, match=r"sparse_linear: out has shape \[2, 21\], but must be \[2, 20\]"):
        _C.sparse_linear(torch.ones(2, 40), data, None, "none", torch.empty(2, 21))
    with pytest.raises(ValueError, match="sparse_linear: the rows of out must be contiguous"):
        _C.sparse_linear(torch.ones(2, 40), data, None, "none", torch.empty(20, 2).T)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d[:40], "packed_weight.data is no packed sparse weight"),
        (lambda d: d.roll(1), "packed_weight.data is no packed sparse weight"),
        (lambda d: d[:-64], "is truncated or damaged: its header does not go with its 2560 bytes"),
        (lambda d: d.to(torch.int16), r"packed_weight.data is int16\[2624\], but must be uint8, contiguous"),
        (lambda d: put(d, 8, 9), "has format version 9, but this lamina reads version 1"),
        (lambda d: put(d, 24, *b"1x4\0"), "has pattern '1x4', but must have one of unstructured, 2x1, 4x1"),
        (lambda d: put(d, 40, *b"int8\0"), "has values of type 'int8', which this op does not take"),
        (lambda d: put(d, 58, 255), "is truncated or damaged"),
        (lambda d: put(d, 12, 0, 0, 0, 0), "is truncated or damaged"),
    ],
)
def test_refuses_foreign_and_damaged_headers(damage, message, generator):
    data = damage(pack_sparse_weight(pruned(20, 40, 0.3, generator), "2x1").data.clone())
    for call in (sparse_info, lambda d: torch.ops.lamina.sparse_linear(torch.ones(2, 40), d, None, 20, "none")):
        with pytest.raises(ValueError, match=message) as error:
            call(data)
        one_sentence(error)
    with pytest.raises(lamina.FormatError, match=message):
        sparse_info(data)


def put(data: torch.Tensor, at: int, *values: int) -> torch.Tensor:
    data[at : at + len(values)] = torch.tensor(values, dtype=torch.uint8)
    return data


@PATTERN
def test_no_damaged_index_gets_past_the_check(pattern, generator):
    """A byte changed anywhere in front of the values is refused, or leads nowhere outside the weight."""
    clean = pack_sparse_weight(pruned(70, 300, 0.1, generator), pattern)
    rows = 1 if pattern == "unstructured" else int(pattern[0])
    end = clean.data.numel() - sparse_info(clean.data).blocks * rows * 4 - 64
    refused = 0
    for at in range(128, end, 7):
        data = put(clean.data.clone(), at, 255)
        try:
            sparse_info(data)
        except lamina.FormatError:
            refused += 1
        else:
            sparse_linear(torch.ones(3, 300), clean._replace(data=data))
            sparse_linear(torch.ones(20, 300), clean._replace(data=data))
            unpack_sparse_weight(clean._replace(data=data))
    assert refused > 20
