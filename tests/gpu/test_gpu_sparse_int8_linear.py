"""sparse_int8_linear on a GPU: the bits of int8_linear with the dense weight, on the CPU."""

import pytest
import torch
from interpreter_repairs import repair
from semi_structured_kernels import kernel_for_two_of_four  # noqa: F401
from tolerances import assert_exact, assert_lossy

import lamina
from lamina.ops import pack_int8_weight, sparse_int8_linear, unpack_sparse_int8_weight
from lamina.ops.library import CPU_IMPLEMENTATIONS
from lamina.ops.sparse_blocks import BLOCKS, index_length, join, pack_blocks, split
from lamina.ops.sparse_int8_linear import PATTERNS, pack_gpu_sparse_int8_weight
from lamina.quant.weights import dequantize_weight, quantize_weight

repair()

BF16 = torch.bfloat16
BLOCK = pytest.mark.parametrize("block", sorted(BLOCKS.values()))
dense_on_cpu = CPU_IMPLEMENTATIONS[torch.ops.lamina.int8_linear.default]


def weights(n: int, k: int, block: int, device: str, density: float = 0.5):
    """Codes and scales of a weight whose second block row has no blocks; the same packed for GPUs, and for the CPU's
    int8_linear."""
    kept = torch.rand(-(-n // block), -(-k // block)) < density
    kept[1:2] = False
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    codes *= kept.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :k]
    scale = torch.rand(n) / 1000
    on_gpu = pack_gpu_sparse_int8_weight(codes.to(device), scale.to(device), f"{block}x{block}")
    return codes, scale, on_gpu, pack_int8_weight(codes, scale)


def on_cpu(x, packed, bias=None, activation="none", residual=None, x_scale=None, out_scale=None, out_dtype=None):
    def here(t):
        return t if t is None else t.cpu()

    return dense_on_cpu(
        here(x), *packed, here(bias), activation, here(residual), here(x_scale), here(out_scale), out_dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("m", [1, 20, 130])
@BLOCK
def test_bits_of_the_cpu(block, m, dtype, device):
    n, k = 2 * block + 5, 3 * block + (16 if m == 130 else 3)
    _, _, sparse, dense = weights(n, k, block, device)
    x, residual = torch.randn(m, k).to(dtype).to(device), torch.randn(m, n).to(BF16).to(device)
    bias, out_scale = torch.randn(n).to(device), torch.tensor(0.07, device=device)
    assert_exact(sparse_int8_linear(x, sparse).cpu(), on_cpu(x, dense))
    full = sparse_int8_linear(x, sparse, bias, activation="relu", residual=residual)
    assert_exact(full.cpu(), on_cpu(x, dense, bias, "relu", residual))
    codes = sparse_int8_linear(x, sparse, bias, activation="relu6", out_scale=out_scale)
    assert_exact(codes.cpu(), on_cpu(x, dense, bias, "relu6", out_scale=out_scale))


def test_codes_as_input(device):
    _, _, sparse, dense = weights(50, 64, 16, device)
    codes = torch.randint(-128, 128, (2, 5, 64), dtype=torch.int8).to(device)
    scales, one = torch.rand(2, 5).to(device), torch.tensor(0.02, device=device)
    for scale in (scales, one):
        y = sparse_int8_linear(codes, sparse, x_scale=scale, out_dtype=BF16)
        assert_exact(y.cpu(), on_cpu(codes, dense, x_scale=scale, out_dtype=BF16))


@BLOCK
def test_nothing_stored(block, device):
    zeros = torch.zeros(40, 70, dtype=torch.int8, device=device)
    packed = pack_gpu_sparse_int8_weight(zeros, torch.ones(40, device=device), f"{block}x{block}")
    bias = torch.arange(40.0, device=device)
    x = torch.randn(5, 70, device=device)
    assert_exact(sparse_int8_linear(x, packed, bias), bias.expand(5, 40).contiguous())


@pytest.mark.parametrize(("m", "k", "n"), [(0, 20, 20), (3, 0, 20), (3, 20, 0)])
def test_sizes_of_zero(m, k, n, device):
    codes = torch.ones(n, k, dtype=torch.int8, device=device)
    packed = pack_gpu_sparse_int8_weight(codes, torch.ones(n, device=device), "16x16")
    y = sparse_int8_linear(torch.ones(m, k, device=device), packed)
    assert_lossy(y, torch.full((m, n), float(k)), min_sqnr_db=40)


def test_gradient(device):
    codes, scale, sparse, _ = weights(40, 50, 16, device)
    x = torch.randn(4, 50, device=device, requires_grad=True)
    out = torch.randn(4, 40, device=device)
    sparse_int8_linear(x, sparse).backward(out)
    assert_lossy(x.grad.cpu(), out.cpu().double() @ dequantize_weight(codes, scale).double(), min_sqnr_db=100)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_other_patterns_are_dense(pattern, device):
    codes, scale, _, dense = weights(30, 40, 4, device)
    packed = pack_gpu_sparse_int8_weight(codes.to(device), scale.to(device), pattern)
    assert packed.data.shape == (30, 40)
    x = torch.randn(4, 40, device=device)
    assert_exact(sparse_int8_linear(x, packed).cpu(), on_cpu(x, dense))


@pytest.mark.parametrize("m", [1, 16, 21])
def test_two_of_four(m, kernel, device):
    if kernel != "cusparselt":
        pytest.skip("int8 goes by cuSPARSELt")
    linear = torch.nn.Linear(128, 96)
    lamina.prune.magnitude_(linear, 0.5, "2:4")
    codes, scale = quantize_weight(linear.weight.detach())
    packed = pack_gpu_sparse_int8_weight(codes.to(device), scale.to(device), "2:4")
    assert packed.data.nbytes < 0.7 * codes.nbytes
    assert_exact(unpack_sparse_int8_weight(packed, 128).cpu(), codes)
    x, bias, residual = (torch.randn(*shape, device=device) for shape in ((2, m, 128), (96,), (2, m, 96)))
    y = sparse_int8_linear(x, packed, bias, activation="relu", residual=residual)
    assert_exact(y.cpu(), on_cpu(x, pack_int8_weight(codes, scale), bias, "relu", residual))
    with pytest.raises(ValueError, match="x has 64 features, but packed_weight was packed for 128"):
        sparse_int8_linear(x[..., :64], packed)
    x.requires_grad_()
    sparse_int8_linear(x, packed).sum().backward()
    truth = dequantize_weight(codes, scale).double().sum(0).expand(2, m, 128)
    assert_lossy(x.grad.cpu(), truth, min_sqnr_db=100)


# -- the layout


@BLOCK
def test_pack_and_unpack_are_inverse(block, device):
    for n, k in ((2 * block + 1, 3 * block - 1), (block, 5), (0, 7), (7, 0), (3, 3 * block)):
        codes, _, packed, _ = weights(n, k, block, device, density=0.7)
        assert_exact(unpack_sparse_int8_weight(packed, k).cpu(), codes)


@BLOCK
@pytest.mark.parametrize("stored", [0, 1, 5, 20, 21, 22, 100, 341, 342])
def test_a_joined_weight_tells_its_blocks(stored, block):
    n, k = 40 * block, 30 * block - 3
    values = torch.ones(stored, block, block, dtype=torch.int8)
    index = torch.arange(index_length(stored, n, k, block), dtype=torch.int32)
    for one, other in zip(split(join(values, index), n, k), (values, index), strict=True):
        assert_exact(one, other)


def test_index_lies_behind_the_values(device):
    codes = torch.eye(40, dtype=torch.int8, device=device)
    values, index = pack_blocks(codes, 16)
    there = split(join(values, index), 40, 40)
    assert_exact(there[0], values)
    assert_exact(there[1], index)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_moves_between_devices():
    codes, scale, _, _ = weights(70, 100, 32, "cpu")
    packed = lamina.ops.pack_sparse_int8_weight(codes, scale, pattern="32x32")
    there = lamina.ops.move_sparse_int8_weight(packed, 100, "cuda", "32x32")
    assert there.data.shape[1:] == (32, 32)
    assert_exact(unpack_sparse_int8_weight(there, 100).cpu(), codes)
    assert_exact(lamina.ops.move_sparse_int8_weight(there, 100, "cpu", "32x32").data, packed.data)


def test_refuses_other_layouts(device):
    _, _, sparse, _ = weights(40, 50, 16, device)
    for data in (sparse.data.view(-1), sparse.data.view(torch.uint8)):
        with pytest.raises(ValueError, match=r"is no weight \[40, 50\] in the layout of GPUs; use move_sparse_int8"):
            sparse_int8_linear(torch.ones(2, 50, device=device), sparse._replace(data=data))
    with pytest.raises(ValueError, match="x has 70 features, but packed_weight was packed for 50"):
        sparse_int8_linear(torch.ones(2, 70, device=device), sparse)


# -- what is compiled


def compiled(block: int, m: int, dtype: torch.dtype = BF16, codes: bool = False):
    def launch() -> None:
        from lamina.kernels import sparse_int8_linear as kernels

        def meta(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        k = n = 1024
        index = meta(index_length(20, n, k, block), dtype=torch.int32)
        x, values = meta(m, k, dtype=torch.int8), meta(20, block, block, dtype=torch.int8)
        scales = meta(m, dtype=torch.float32), meta(n, dtype=torch.float32)
        out_scale = meta(dtype=torch.float32) if codes else None
        out = meta(m, n, dtype=torch.int8 if codes else dtype)
        residual = None if codes else meta(m, n)
        kernels.sparse_int8_linear(x, scales[0], values, index, scales[1], meta(n), "gelu", residual, out_scale, out)

    return launch


def compiled_finish() -> None:
    from lamina.kernels.int8_linear import finish_sums

    floats = (torch.empty(shape, dtype=torch.float32, device="meta") for shape in (4096, 1024, 1024))
    sums = torch.empty(1, 4096, 1024, dtype=torch.int32, device="meta")
    finish_sums(sums, *floats, "gelu", None, None, torch.empty(4096, 1024, dtype=BF16, device="meta"))


COMPILED = [
    compiled_finish,
    *(compiled(block, m) for block in (16, 32, 64) for m in (1, 4096)),
    compiled(64, 4096, codes=True),
    compiled(64, 64, torch.float32),
]
