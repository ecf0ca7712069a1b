"""sparse_linear on a GPU: square blocks, forward and backward, and weights that fall to dense."""

import re

import pytest
import torch
from semi_structured_kernels import kernel_for_two_of_four  # noqa: F401
from tolerances import (
    ACTIVATION_SLOPE,
    TF32X3_ERROR,
    activation_error,
    assert_exact,
    assert_lossy,
    assert_sum,
)

import lamina
from lamina.ops import semi_structured, sparse_linear
from lamina.ops.sparse_blocks import BLOCKS, index_length, pack_blocks, unpack_blocks
from lamina.ops.sparse_linear import (
    PATTERNS,
    PackedSparseWeight,
    _weight_cpu,
    pack_gpu_sparse_weight,
    sparse_kernel,
    unpack_sparse_weight,
)
from lamina.reference.sparse_linear import sparse_linear as reference
from lamina.sparsity import choose_semi_structured

BF16 = torch.bfloat16
BLOCK = pytest.mark.parametrize("block", sorted(BLOCKS.values()))
FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
DTYPE = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)


def pruned(n: int, k: int, block: int, density: float, generator: torch.Generator) -> torch.Tensor:
    """Random blocks of [n, k]; the second block row and block column have none."""
    kept = torch.rand(-(-n // block), -(-k // block), generator=generator) < density
    kept[1:2] = kept[:, 1:2] = False
    kept = kept.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :k]
    return torch.where(kept, torch.randn(n, k, generator=generator) / 8, 0.0)


def pattern_of(block: int) -> str:
    return f"{block}x{block}"


def check_product(y, x64, weight64, bias64=None, activation="none") -> None:
    linear = x64 @ weight64.T + (0 if bias64 is None else bias64)
    magnitude = x64.abs() @ weight64.abs().T + (0 if bias64 is None else bias64.abs())
    slope = ACTIVATION_SLOPE[activation]
    terms = (int((weight64 != 0).sum(1).max()) if weight64.numel() else 0) + 1
    extra = activation_error(activation, linear)
    if y.dtype == torch.float32:
        extra = extra + slope * magnitude * TF32X3_ERROR
    truth = reference(x64, weight64, bias64, activation)
    assert_sum(y.cpu(), truth, terms=terms, magnitude=slope * magnitude, extra=extra)


def product(device, block, m, k, n, dtype, *, density=0.5, activation=None, bias=True, values=None, seed=0):
    """Multiplies and checks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).to(dtype)
    weight = pruned(n, k, block, density, generator).to(values or dtype)
    b = torch.randn(n, generator=generator) if bias else None
    packed = pack_gpu_sparse_weight(weight.to(device), pattern_of(block))
    y = sparse_linear(x.to(device), packed, None if b is None else b.to(device), activation=activation)
    assert y.dtype == dtype
    used = weight.to(dtype).double()
    check_product(y, x.double(), used, None if b is None else b.double(), activation or "none")


@DTYPE
@BLOCK
def test_few_rows(block, dtype, device):
    product(device, block, 3, 3 * block + 8, 2 * block + 5, dtype)


@DTYPE
@BLOCK
def test_many_rows(block, dtype, device):
    """Several programs of rows, the last with one row; inputs that the copy engine can read."""
    product(device, block, 129, 3 * block + 8, 2 * block + 8, dtype)


@BLOCK
def test_odd_sizes(block, device):
    """No row of x begins where the copy engine could read, and blocks divide nothing."""
    product(device, block, 67, 4 * block - 3, 3 * block - 1, torch.bfloat16, bias=False)
    product(device, block, 1, block + 1, 1, torch.bfloat16)
    product(device, block, 40, 1, block + 1, torch.float32, density=1)


@BLOCK
def test_values_take_the_dtype_of_x(block, device):
    product(device, block, 9, 2 * block, block, torch.bfloat16, values=torch.float32)
    product(device, block, 70, 2 * block, block, torch.float32, values=torch.bfloat16)


@pytest.mark.parametrize("activation", [name for name in ACTIVATION_SLOPE if name != "none"])
def test_activations(activation, device):
    product(device, 16, 20, 48, 33, torch.float32, activation=activation, density=1)


def test_activations_of_what_is_not_finite(device):
    x = torch.tensor([[float("inf")], [float("-inf")], [float("nan")], [30.0], [-30.0]])
    packed = pack_gpu_sparse_weight(torch.ones(1, 1, device=device), "16x16")
    for activation in ACTIVATION_SLOPE:
        y = sparse_linear(x.to(device), packed, activation=activation).cpu()
        expected = reference(x, torch.ones(1, 1), None, activation)
        if activation in ("gelu", "gelu_tanh", "quick_gelu", "silu", "hardswish"):
            expected[1] = 0  # torch has NaN
        assert_lossy(y[3:], expected[3:], min_sqnr_db=120, what=activation)
        assert_exact(y[:3] + 0.0, expected[:3].float(), activation)  # -0 is 0


@BLOCK
def test_nothing_stored(block, device):
    packed = pack_gpu_sparse_weight(torch.zeros(40, 70, device=device), pattern_of(block))
    assert packed.data.shape == (0, block, block)
    x = torch.full((5, 70), float("nan"), device=device)
    bias = torch.arange(40.0, device=device)
    assert_exact(sparse_linear(x, packed, bias), bias.expand(5, 40).contiguous())


@pytest.mark.parametrize(("m", "k", "n"), [(0, 20, 20), (3, 0, 20), (3, 20, 0), (0, 0, 0)])
def test_sizes_of_zero(m, k, n, device):
    packed = pack_gpu_sparse_weight(torch.ones(n, k, device=device), "16x16")
    x, bias = torch.ones(m, k, device=device, requires_grad=True), torch.ones(n, device=device)
    values = packed.data.requires_grad_()
    y = sparse_linear(x, packed, bias)
    assert_exact(y.detach().cpu(), torch.full((m, n), k + 1.0))
    y.sum().backward()
    assert_exact(x.grad.cpu(), torch.full((m, k), float(n)))
    assert values.grad.shape == values.shape


@BLOCK
def test_leading_dimensions_and_strides(block, device):
    generator = torch.Generator().manual_seed(3)
    weight = pruned(50, 60, block, 0.7, generator).to(device)
    packed = pack_gpu_sparse_weight(weight, pattern_of(block))
    x = torch.randn(2, 3, 60, generator=generator).to(device)
    y = sparse_linear(x, packed)
    assert y.shape == (2, 3, 50)
    wide = torch.zeros(2, 60, 6, device=device)
    wide[..., ::2] = x.transpose(1, 2)
    assert_exact(sparse_linear(wide[..., ::2].transpose(1, 2), packed), y)
    assert_exact(sparse_linear(x[1, 2], packed), y[1, 2])
    assert_exact(sparse_linear(x, packed), y)


def test_only_stored_blocks_see_what_is_not_finite(device):
    weight = torch.zeros(48, 64)
    weight[:16, :16] = weight[16:32, 48:] = 1
    x = torch.ones(70, 64)
    x[5, 3] = float("nan")
    x[6, 20] = float("inf")
    y = sparse_linear(x.to(device), pack_gpu_sparse_weight(weight.to(device), "16x16")).cpu()
    assert y[5, :16].isnan().all()
    y[5, :16] = 16
    expected = torch.zeros(70, 48)
    expected[:, :32] = 16
    assert_exact(y, expected)


# -- gradients


@DTYPE
@BLOCK
def test_gradients(block, dtype, device):
    """For x, for the values of the stored blocks and no others, and for the bias."""
    generator = torch.Generator().manual_seed(1)
    m, k, n = 70, 3 * block + 8, 2 * block + 8
    weight = pruned(n, k, block, 0.6, generator).to(dtype)
    x, out = (torch.randn(m, size, generator=generator).to(dtype) for size in (k, n))
    bias = torch.randn(n, generator=generator)
    values, _, index = pack_gpu_sparse_weight(weight.to(device), pattern_of(block))
    ours = [t.detach().to(device).requires_grad_() for t in (x, values, bias)]
    y = sparse_linear(ours[0], PackedSparseWeight(ours[1], n, index), ours[2])
    y.backward(out.to(device))
    x64, weight64, out64 = x.double(), weight.double(), out.double()
    check_product(ours[0].grad, out64, weight64.T.contiguous())
    assert ours[1].grad.dtype == dtype
    expected, magnitude = (
        _weight_cpu(a, b, values.cpu().double(), index.cpu()) for a, b in ((out64, x64), (out64.abs(), x64.abs()))
    )
    extra = magnitude * TF32X3_ERROR if dtype == torch.float32 else 0.0
    assert_sum(ours[1].grad.cpu(), expected, terms=m, magnitude=magnitude, extra=extra)
    assert_lossy(ours[2].grad.cpu(), out64.sum(0), min_sqnr_db=120 if dtype == torch.float32 else 40)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_gradient_behind_an_activation(activation, device):
    generator = torch.Generator().manual_seed(2)
    weight = pruned(40, 48, 16, 0.6, generator)
    packed = pack_gpu_sparse_weight(weight.to(device), "16x16")
    x = torch.randn(2, 5, 48, generator=generator)
    truth = x.double().requires_grad_()
    ours = x.to(device).requires_grad_()
    sparse_linear(ours, packed, activation=activation).square().sum().backward()
    reference(truth, weight, None, activation).square().sum().backward()
    assert_lossy(ours.grad.cpu(), truth.grad, min_sqnr_db=90)


# -- the layout


@BLOCK
def test_pack_and_unpack_are_inverse(block, device):
    generator = torch.Generator().manual_seed(4)
    for n, k in ((2 * block + 1, 3 * block - 1), (block, 5), (0, 7), (7, 0), (3, 3 * block)):
        weight = pruned(n, k, block, 0.5, generator).to(device)
        values, index = pack_blocks(weight, block)
        assert index.shape == (index_length(values.shape[0], n, k, block),)
        assert_exact(unpack_blocks(values, index, n, k), weight)
        packed = PackedSparseWeight(values, n, index)
        assert_exact(unpack_sparse_weight(packed, k), weight)


def test_index():
    """Of blocks  . A    by rows: 0 1 3 4, by columns: B, A C, D
    B C .
    . . D"""
    weight = torch.zeros(48, 48)
    for row, column in ((0, 1), (1, 0), (1, 1), (2, 2)):
        weight[16 * row, 16 * column + 3] = 1
    _, index = pack_blocks(weight, 16)
    rows, columns = ([0, 1, 3, 4], [1, 0, 2], [1, 0, 1, 2]), ([0, 1, 3, 4], [1, 0, 2], [1, 0, 1, 2], [1, 0, 2, 3])
    assert index.tolist() == [i for part in (*rows, *columns) for i in part]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_other_patterns_are_dense(pattern, device):
    generator = torch.Generator().manual_seed(5)
    weight = pruned(30, 40, 1, 0.4, generator).to(device)
    packed = pack_gpu_sparse_weight(weight, pattern)
    assert packed.index is None
    x = torch.randn(4, 40, generator=generator).to(device).requires_grad_()
    y = sparse_linear(x, packed, activation="relu")
    assert_lossy(y.detach().cpu(), reference(x.detach().cpu(), weight.cpu(), None, "relu"), min_sqnr_db=60)
    y.sum().backward()
    assert_lossy(x.grad.cpu(), ((y > 0).double() @ weight.double()).cpu(), min_sqnr_db=60)
    assert "dense: NVIDIA GPUs have no kernel for " + pattern in sparse_kernel(pattern, "cuda")
    assert sparse_kernel("64x64", "cuda") == "blocks of 64x64"
    assert sparse_kernel("64x64", "cpu") == "blocks of 4x1"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_moves_between_devices():
    weight = pruned(70, 100, 32, 0.5, torch.Generator().manual_seed(6))
    packed = lamina.ops.pack_sparse_weight(weight, "32x32")
    there = lamina.ops.move_sparse_weight(packed, 100, "32x32", "cuda")
    assert there.data.shape[1:] == (32, 32)
    assert_exact(unpack_sparse_weight(there, 100).cpu(), weight)
    back = lamina.ops.move_sparse_weight(there, 100, "32x32", "cpu")
    assert_exact(back.data, packed.data)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="reports speak of the device")
def test_reports_name_what_is_dense():
    for config, words in ((lamina.Sparse("4x1"), "4x1"), (lamina.SparseInt8("4x4"), "4x4")):
        model = torch.nn.Sequential(torch.nn.Linear(64, 64)).cuda()
        lamina.prune.magnitude_(model, 0.9, "4x4")
        (decision,) = lamina.swap_(model, config).swapped
        said = f"dense: NVIDIA GPUs have no kernel for {words}, use 16x16, 32x32 or 64x64"
        assert said in decision.reason
        assert said in repr(model)


@pytest.mark.parametrize(
    ("x", "bias", "activation", "message"),
    [
        (torch.ones(2, 41), None, None, r"packed_weight was not packed for \[20, 41\]"),
        (torch.ones(2, 40, dtype=torch.float64), None, None, "x is torch.float64, but must be float32, bfloat16"),
        (torch.tensor(1.0), None, None, "x is a scalar"),
        (torch.ones(2, 40), torch.ones(19), None, r"bias has shape \[19\], but must be \[20\]"),
        (torch.ones(2, 40), None, "softsign", "activation 'softsign' is unknown; use none, relu, relu6, gelu"),
    ],
)
def test_refuses_wrong_input(x, bias, activation, message, device):
    packed = pack_gpu_sparse_weight(torch.ones(20, 40, device=device), "16x16")
    bias = None if bias is None else bias.to(device)
    with pytest.raises(ValueError, match=f"sparse_linear: {message}"):
        sparse_linear(x.to(device), packed, bias, activation=activation)


def test_refuses_the_layout_of_the_cpu(device):
    packed = lamina.ops.pack_sparse_weight(torch.ones(20, 40))
    with pytest.raises(ValueError, match="packed_weight has the layout of the CPU"):
        sparse_linear(torch.ones(2, 40, device=device), packed._replace(data=packed.data.to(device)))


def test_refuses_to_pack(device):
    with pytest.raises(
        ValueError, match="pattern '1x4' is unknown; use unstructured, 2x1, 4x1, 16x16, 32x32, 64x64, 2:4"
    ):
        pack_gpu_sparse_weight(torch.ones(4, 4, device=device), "1x4")
    with pytest.raises(ValueError, match=r"weight is torch\.float64, but must be float32, bfloat16 or float16"):
        pack_gpu_sparse_weight(torch.ones(4, 4, device=device, dtype=torch.float64), "16x16")


# -- 2:4


def two_of_four(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    linear = torch.nn.Linear(k, n)
    lamina.prune.magnitude_(linear, 0.5, "2:4")
    weight = linear.weight.detach().to(dtype)
    weight[3:5, :20] = 0  # fewer than two of four
    return weight


@pytest.mark.parametrize("m", [1, 8, 13])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_of_four(m, dtype, kernel, device):
    weight, x, bias = two_of_four(96, 128, dtype), torch.randn(2, m, 128).to(dtype), torch.randn(96)
    packed = pack_gpu_sparse_weight(weight.to(device), "2:4")
    assert semi_structured.kernel_of(packed.data, packed.index) == kernel
    assert packed.data.nbytes < 0.7 * weight.nbytes
    assert_exact(unpack_sparse_weight(packed, 128).cpu(), weight)
    x = x.to(device).requires_grad_()
    for b in (None, bias.to(device)):
        y = sparse_linear(x, packed, b, activation="relu")
        truth = reference(x.detach().cpu(), weight, None if b is None else bias, "relu")
        assert y.dtype == dtype
        assert_lossy(y.detach().cpu(), truth, min_sqnr_db=45)
    y.sum().backward()
    assert_lossy(x.grad.cpu(), (y > 0).cpu().double() @ weight.double(), min_sqnr_db=40)
    wide = sparse_linear(x.detach().float(), packed)
    assert wide.dtype == torch.float32
    assert_lossy(wide.cpu(), reference(x.detach().cpu(), weight), min_sqnr_db=60)
    with pytest.raises(ValueError, match=r"packed_weight was not packed for \[96, 64\]"):
        sparse_linear(x[..., :64], packed)
    with pytest.raises(ValueError, match="the values of a 2:4 weight do not train"):
        sparse_linear(x, packed._replace(data=packed.data.clone().requires_grad_())).sum().backward()


def test_what_no_kernel_for_two_of_four_takes_is_dense(kernel, device):
    for weight, why in (
        (two_of_four(96, 128, torch.float32), "its weight is float32, and 2:4 kernels take bfloat16 and float16"),
        (two_of_four(90, 128, BF16), r"its weight is \[90, 128\], and 2:4 kernels take multiples of \[32, 64\]"),
        (torch.ones(96, 128, dtype=BF16), "more than two of four neighbours in its weight are not zero"),
    ):
        on_device = weight.to(device)
        assert pack_gpu_sparse_weight(on_device, "2:4").index is None
        assert re.fullmatch(f"dense: {why}", sparse_kernel("2:4", "cuda", on_device))
    assert sparse_kernel("2:4", "cuda", two_of_four(96, 128, BF16).to(device)) == "2:4"


def test_the_faster_kernel_for_two_of_four_is_chosen(kernel, device, monkeypatch):
    """Whatever machine this is: the clock says 10 dense, and 7 or 12 for the kernel."""
    weight = two_of_four(96, 128, BF16).to(device)
    for time, pattern in ((7.0, "2:4"), (12.0, None)):
        monkeypatch.setattr("lamina.sparsity._medians", lambda calls, stopwatch, t=time: [10.0, t][: len(calls)])
        monkeypatch.setattr(semi_structured, "kernels", lambda device: (kernel,))
        choice = choose_semi_structured(weight, rows=4)
        assert choice.pattern == pattern
        assert choice.reason == f"2:4 by {kernel} takes {time / 10:.2f} of the dense product's time on 4 rows"
    assert [*semi_structured._preferred.values()] == [kernel]


# -- what is compiled


def compiled(block: int, m: int, dtype: torch.dtype, transposed: bool = False, activation: str = "none"):
    def launch() -> None:
        from lamina.kernels import sparse_linear as kernels

        def meta(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        k = n = 1024
        values, index = meta(20, block, block), meta(index_length(20, n, k, block), dtype=torch.int32)
        if transposed:
            kernels.sparse_linear_backward(meta(m, n), values, index, meta(m, k))
        else:
            kernels.sparse_linear(meta(m, k), values, index, meta(n), activation, meta(m, n))

    return launch


def compiled_gradient(block: int, dtype: torch.dtype):
    def launch() -> None:
        from lamina.kernels import sparse_linear as kernels

        index = torch.empty(index_length(20, 1024, 1024, block), dtype=torch.int32, device="meta")
        grad, x = (torch.empty(4096, 1024, dtype=dtype, device="meta") for _ in range(2))
        out = torch.empty(20, block, block, dtype=dtype, device="meta")
        kernels.sparse_linear_weight_gradient(grad, x, index, out)

    return launch


def test_tf32_is_asked_for_in_the_way_of_any_torch():
    from lamina.kernels.sparse_linear import precision

    matmul = torch.backends.cuda.matmul
    try:
        for asked, expected in (("tf32", "tf32"), ("ieee", "tf32x3")):
            matmul.fp32_precision = asked
            assert precision(torch.float32) == expected
            assert precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = "none"
    try:
        matmul.allow_tf32 = True
        assert precision(torch.float32) == "tf32"
    finally:
        matmul.allow_tf32 = False
    assert precision(torch.float32) == "tf32x3"


COMPILED = [
    *(compiled(block, 4096, torch.bfloat16, transposed) for block in (16, 32, 64) for transposed in (False, True)),
    compiled(64, 4096, torch.bfloat16, activation="gelu"),
    compiled(64, 4096, torch.float32),
    compiled(64, 4096, torch.float32, transposed=True),
    compiled(16, 4096, torch.float32),
    *(compiled(block, m, torch.bfloat16) for block, m in ((64, 1), (64, 32), (64, 64), (16, 1))),
    compiled(64, 1, torch.float32),
    *(compiled_gradient(block, dtype) for block in (16, 64) for dtype in (torch.bfloat16, torch.float32)),
]
