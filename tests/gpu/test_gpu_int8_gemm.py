"""The CUDA C++ product of int8_linear: the same bits as on the CPU wherever the op promises the same bits.

Without a GPU its epilogue, whose arithmetic is in one header, is compiled for the CPU and takes sums from PyTorch.
With one, and in a build with CUTLASS, the kernels themselves run.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tolerances import assert_activation, assert_exact

from lamina import _C
from lamina.ops.int8_linear import ACTIVATIONS, pack_int8_weight
from lamina.reference.int8_linear import ACTIVATIONS as TRUTH

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++")
# Those of the same bits everywhere. The others are within their error, and nothing for infinite inputs.
EXACT = "none", "relu", "relu6", "hardswish"
APPROXIMATE = tuple(name for name in ACTIVATIONS if name not in EXACT)
OUT_SCALE = 0.11


class Product:
    """codes [m, k] times a weight [n, k], with an epilogue whose values reach the bends of every activation."""

    def __init__(self, m: int, n: int, k: int, bias=torch.float32, residual=None) -> None:
        self.codes = torch.randint(-127, 128, (m, k), dtype=torch.int8)
        self.weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        self.x_scale = torch.rand(m) * 0.01 + 0.01
        self.w_scale = (torch.rand(n) + 0.5) * 0.05 / max(k, 1) ** 0.5
        self.bias = None if bias is None else (4 * torch.randn(n)).to(bias)
        self.residual = None if residual is None else (4 * torch.randn(m, n)).to(residual)

    def on_cpu(self, activation: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """By the CPU's kernels, in float32 or int8."""
        out = torch.empty(len(self.codes), len(self.weight), dtype=dtype)
        out_scale = torch.tensor(OUT_SCALE) if dtype is torch.int8 else None
        # What the CPU does not take is exact in float32.
        bias, residual = (None if t is None else t.float() for t in (self.bias, self.residual))
        packed = pack_int8_weight(self.weight, self.w_scale)
        _C.int8_linear(self.codes, *packed, bias, activation, residual, self.x_scale, out_scale, out)
        return out


def assert_right(actual: torch.Tensor, product: Product, activation: str) -> None:
    if activation in EXACT:
        if actual.dtype is torch.int8:
            assert_exact(actual, product.on_cpu(activation, torch.int8))
        else:
            assert_exact(actual, product.on_cpu(activation).to(actual.dtype))
        return
    before = product.on_cpu("none").double()
    truth = TRUTH[activation](before)
    if actual.dtype is not torch.int8:
        return assert_activation(actual, before, truth, activation)
    # A code may be its neighbour where the value is close to the middle between them.
    distance = (actual.double() - (truth / OUT_SCALE).clamp(-127, 127)).abs()
    assert distance.max() <= 0.5 + 1e-3


if COMPILER:

    @pytest.fixture(scope="module")
    def finish(tmp_path_factory):
        library = tmp_path_factory.mktemp("epilogue") / "epilogue.so"
        source = Path(__file__).with_name("int8_epilogue_on_host.cpp")
        flags = "-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC"
        subprocess.run([COMPILER, *flags, "-I", ROOT / "csrc", source, "-o", library], check=True)
        function = ctypes.CDLL(library).finish

        def call(product: Product, activation: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            sums = product.codes.int() @ product.weight.int().T
            out = torch.empty(sums.shape, dtype=dtype)
            scale = torch.tensor(OUT_SCALE)
            tensors = [product.x_scale, product.w_scale, product.bias, product.residual]
            pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
            codes = dtype is torch.int8
            function(
                ctypes.c_void_p(sums.data_ptr()),
                *sums.shape,
                *pointers,
                list(ACTIVATIONS).index(activation),
                ctypes.c_void_p(scale.data_ptr() if codes else None),
                *(ctypes.c_void_p(out.data_ptr()),) * 2,
            )
            return out

        return call

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_epilogue(finish, activation, dtype):
        for bias, residual in ((torch.float32, None), (None, torch.float32), (torch.float32, torch.float32)):
            product = Product(37, 70, 33, bias, residual)
            assert_right(finish(product, activation, dtype), product, activation)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_epilogue_of_special_values(finish, activation):
        special = torch.tensor([0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38, 90.0, -90.0, torch.inf, torch.nan, -torch.inf])
        product = Product(1, len(special), 4, None, torch.float32)
        product.codes.zero_()
        product.residual = special[None].clone()
        actual = finish(product, activation)
        if activation in EXACT:
            return assert_exact(actual, product.on_cpu(activation))
        truth = TRUTH[activation](special.double())[None]
        truth[0, -1] = -1.0 if activation == "tanh" else 0.0
        assert_activation(actual, special.double()[None], truth, activation)

    def test_epilogue_rounds_halves_to_even(finish):
        product = Product(1, 300, 4, None, torch.float32)
        product.codes.zero_()
        product.residual = (torch.arange(300.0)[None] / 2 - 75) * torch.tensor(OUT_SCALE)
        assert_exact(finish(product, "none", torch.int8), product.on_cpu("none", torch.int8))


if torch.cuda.is_available() and _C.with_cutlass:
    DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]

    def multiply(product: Product, activation: str = "none", dtype: torch.dtype = torch.float32, out=None):
        names = "codes", "weight", "x_scale", "w_scale", "bias", "residual"
        tensors = [None if t is None else t.cuda() for t in (getattr(product, name) for name in names)]
        if out is None:
            out = torch.full((len(product.codes), len(product.weight)), 99, device="cuda").to(dtype)
        assert _C.int8_linear_fits_cuda(tensors[0], tensors[1], out)
        out_scale = torch.tensor(OUT_SCALE, device="cuda") if dtype is torch.int8 else None
        _C.int8_linear_cuda(*tensors, activation, out_scale, out)
        return out.cpu()

    # Every tile size, full and cut in all three dimensions; the last has enough of the largest tiles.
    SIZES = [
        (1, 16, 16),
        (1, 4096, 4096),
        (5, 48, 80),
        (32, 64, 128),
        (33, 80, 144),
        (63, 1040, 272),
        (64, 32, 256),
        (65, 128, 128),
        (127, 144, 400),
        (128, 256, 64),
        (129, 272, 48),
        (300, 1200, 1008),
        (1030, 272, 144),
        (1100, 7696, 144),
    ]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("m", "n", "k"), SIZES)
    def test_sizes(m, n, k, dtype):
        product = Product(m, n, k)
        assert_right(multiply(product, dtype=dtype), product, "none")

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("m", [7, 140])
    def test_activations(m, activation, dtype):
        product = Product(m, 160, 96, residual=torch.float32)
        assert_right(multiply(product, activation, dtype), product, activation)

    @pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_bias_and_residual(bias, residual):
        for m in (3, 140):
            product = Product(m, 144, 64, bias, residual)
            assert_right(multiply(product, "relu"), product, "relu")

    def test_rows_may_have_strides_and_a_residual_any_alignment():
        product = Product(70, 144, 64, residual=torch.float32)
        out = torch.zeros(70, 176, device="cuda")[:, 16:160]
        wide = []
        for t in (product.codes, product.weight):
            view = torch.zeros(len(t), 96, dtype=torch.int8, device="cuda")[:, 16:80]
            wide.append(view.copy_(t))
        residual = torch.zeros(70, 147, device="cuda")[:, 1:145].copy_(product.residual)
        bias = torch.zeros(147, device="cuda")[3:].copy_(product.bias)
        _C.int8_linear_cuda(*wide, product.x_scale.cuda(), product.w_scale.cuda(), bias, residual, "none", None, out)
        assert_exact(out.cpu(), product.on_cpu("none"))

    def test_one_scale_for_all_rows():
        product = Product(40, 48, 64)
        product.x_scale.fill_(0.02)
        expected = product.on_cpu("none")
        product.x_scale = torch.tensor(0.02)
        assert_exact(multiply(product), expected)

    def test_no_rows():
        assert multiply(Product(0, 32, 32)).shape == (0, 32)

    def test_nan_and_infinity():
        for dtype in DTYPES:
            product = Product(70, 144, 64, residual=torch.float32)
            product.x_scale[3] = torch.nan
            product.residual[5, 7] = torch.inf
            assert_right(multiply(product, dtype=dtype), product, "none")

    def test_captured_in_a_graph():
        product = Product(140, 144, 64)
        multiply(product)
        arguments = [t.cuda() for t in (product.codes, product.weight, product.x_scale, product.w_scale, product.bias)]
        out = torch.zeros(140, 144, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _C.int8_linear_cuda(*arguments, None, "none", None, out)
        graph.replay()
        assert_exact(out.cpu(), product.on_cpu("none"))

    @pytest.mark.parametrize(("n", "k"), [(24, 32), (32, 24), (1, 16), (16, 0)])
    def test_sizes_that_do_not_fit(n, k):
        product = Product(4, n, k)
        out = torch.empty(4, n, device="cuda")
        codes, weight, x_scale, w_scale = (
            t.cuda() for t in (product.codes, product.weight, product.x_scale, product.w_scale)
        )
        assert not _C.int8_linear_fits_cuda(codes, weight, out)
        with pytest.raises(ValueError, match="multiples of 16"):
            _C.int8_linear_cuda(codes, weight, x_scale, w_scale, None, None, "none", None, out)

    def test_refusals():
        product = Product(4, 16, 32)
        good = {
            "codes": product.codes.cuda(),
            "weight_codes": product.weight.cuda(),
            "x_scale": product.x_scale.cuda(),
            "w_scale": product.w_scale.cuda(),
            "bias": product.bias.cuda(),
            "residual": None,
            "activation": "none",
            "out_scale": None,
            "out": torch.empty(4, 16, device="cuda"),
        }
        for name, value, message in (
            ("codes", good["codes"].float(), "codes"),
            ("weight_codes", good["weight_codes"][:, :16], "weight_codes"),
            ("x_scale", good["x_scale"][:3], "x_scale"),
            ("w_scale", good["w_scale"][:3], "w_scale"),
            ("bias", good["bias"].double(), "bias"),
            ("residual", torch.empty(3, 16, device="cuda"), "residual"),
            ("activation", "swish", "activation 'swish' is unknown"),
            ("out_scale", torch.ones((), device="cuda"), "out"),
            ("out", good["out"][:3], "out"),
        ):
            with pytest.raises(ValueError, match=f"^int8_linear_cuda: {message}"):
                _C.int8_linear_cuda(*(good | {name: value}).values())
