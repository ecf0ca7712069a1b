"""sparse_conv2d: what holds beside "close to the reference", and every way to call it wrongly."""

import pytest
import torch
from tolerances import assert_exact, assert_lossy
from torch.nn import functional as F

import lamina
from lamina import _C
from lamina.ops import pack_sparse_conv_weight, sparse_conv2d, sparse_linear, unpack_sparse_conv_weight
from lamina.ops.sparse_linear import PATTERNS


def pruned(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.3)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 2)])
def test_pack_and_unpack_are_inverse(pattern, kernel, generator):
    weight = pruned(21, 10, *kernel, generator=generator)
    packed = pack_sparse_conv_weight(weight, pattern)
    assert_exact(unpack_sparse_conv_weight(packed, kernel).contiguous().abs(), weight.abs())
    assert_exact(pack_sparse_conv_weight(weight.to(memory_format=torch.channels_last), pattern).data, packed.data)


def test_one_tap_is_a_linear_layer(isa, generator):
    x, weight = torch.randn(3, 40, 5, 7, generator=generator), pruned(21, 40, 1, 1, generator=generator)
    packed = pack_sparse_conv_weight(weight)
    with lamina.force_isa(isa):
        y = sparse_conv2d(x, packed, kernel_size=1)
        rows = sparse_linear(x.permute(0, 2, 3, 1), packed)
    assert_exact(y.permute(0, 2, 3, 1).contiguous(), rows)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_output_is_channels_last(layout, generator):
    x = torch.randn(2, 10, 6, 7, generator=generator).contiguous(memory_format=layout)
    packed = pack_sparse_conv_weight(pruned(8, 10, 3, 3, generator=generator))
    y = sparse_conv2d(x, packed, padding=1, kernel_size=3)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padding", ["valid", 2, (1, 0)])
def test_padding_is_torchs(padding, generator):
    x, weight = torch.randn(2, 10, 6, 7, generator=generator), pruned(8, 10, 3, 4, generator=generator)
    bias = torch.randn(8, generator=generator)
    y = sparse_conv2d(x, pack_sparse_conv_weight(weight, "4x1"), bias, padding=padding, kernel_size=(3, 4))
    assert_lossy(y, F.conv2d(x.double(), weight.double(), bias.double(), padding=padding), min_sqnr_db=125)


@pytest.mark.parametrize("padding", ["same", (2, 1)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradient_is_that_of_the_dense_layer(padding, activation, generator):
    x = torch.randn(2, 5, 6, 7, generator=generator, requires_grad=True)
    bias = torch.randn(8, generator=generator, requires_grad=True)
    weight = pruned(8, 5, 3, 5, generator=generator)
    packed = pack_sparse_conv_weight(weight, "2x1")
    y = sparse_conv2d(x, packed, bias, padding=padding, kernel_size=(3, 5), activation=activation)
    out = torch.randn(y.shape, generator=generator)
    y.backward(out)
    x64, bias64 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    truth = F.conv2d(x64, weight.double(), bias64, padding=padding)
    (F.silu(truth) if activation else truth).backward(out.double())
    assert_lossy(x.grad, x64.grad, min_sqnr_db=100)
    assert_lossy(bias.grad, bias64.grad, min_sqnr_db=100)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.ones(2, 9, 6, 7), {}, "x has 9 channels and the kernel is 3 x 3, but packed_weight was packed for 90"),
        (torch.ones(2, 10, 6, 7).double(), {}, "x is float64, but must be float32 or bfloat16"),
        (torch.ones(2, 10), {}, r"x has shape \[2, 10\], but must be \[B, C, H, W\] or \[C, H, W\]"),
        (torch.ones(2, 10, 6, 7), {"stride": 0}, "kernel, stride and dilation must be positive"),
        (torch.ones(2, 10, 6, 7), {"padding": -1}, "padding must not be negative"),
        (torch.ones(2, 10, 6, 7), {"activation": "softsign"}, "activation 'softsign' is unknown"),
        (torch.ones(2, 10, 6, 7), {"bias": torch.ones(7)}, r"bias has shape \[7\], but must be \[8\]"),
    ],
)
def test_refuses_wrong_input(x, options, message):
    packed = pack_sparse_conv_weight(torch.ones(8, 10, 3, 3))
    with pytest.raises(ValueError, match=f"sparse_conv2d: .*{message}") as error:
        sparse_conv2d(x, packed, kernel_size=3, **options)
    assert "\n" not in str(error.value)


def test_refuses_images_smaller_than_the_kernel():
    packed = pack_sparse_conv_weight(torch.ones(8, 10, 3, 3))
    with pytest.raises(RuntimeError, match="sparse_conv2d: the kernel does not fit into images of 2 x 7 pixels"):
        sparse_conv2d(torch.ones(2, 10, 2, 7), packed, kernel_size=3)


def test_refuses_a_wrong_output_and_foreign_weights():
    x, data = torch.ones(2, 10, 6, 7), pack_sparse_conv_weight(torch.ones(8, 10, 1, 1)).data
    last = x.contiguous(memory_format=torch.channels_last)
    geometry = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="sparse_conv2d: the channels of x must be adjacent"):
        _C.sparse_conv2d(x, data, None, geometry, "none", torch.empty(2, 8, 6, 7))
    with pytest.raises(ValueError, match="sparse_conv2d: out must be channels_last"):
        _C.sparse_conv2d(last, data, None, geometry, "none", torch.empty(2, 8, 6, 7))
    with pytest.raises(ValueError, match="sparse_conv2d: geometry has 3 numbers"):
        _C.sparse_conv2d(last, data, None, [1, 2, 3], "none", torch.empty(2, 8, 6, 7))
    with pytest.raises(lamina.FormatError, match=r"sparse_conv2d: packed_weight.data is no packed sparse weight"):
        _C.sparse_conv2d(last, data.roll(1), None, geometry, "none", torch.empty(2, 8, 6, 7))
    with pytest.raises(ValueError, match=r"weight has shape \[8, 10\], but must be \[N, C, kh, kw\]"):
        pack_sparse_conv_weight(torch.ones(8, 10))
