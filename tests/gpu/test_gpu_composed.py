"""What torch's own ops compute on a GPU for lamina."""

import pytest
import torch
from cases import SUITES
from tolerances import assert_exact
from torch.utils._pytree import tree_map_only

import lamina

LINEARS = SUITES["linear"].cases[::7]


pytestmark = pytest.mark.usefixtures("exact_products")


def moved(inputs: tuple, device: str) -> tuple:
    return tree_map_only(torch.Tensor, lambda t: t.to(device), inputs)


@pytest.mark.parametrize("case", LINEARS, ids=[case.id for case in LINEARS])
def test_linear(case, seed, device):
    suite, inputs = SUITES["linear"], case.inputs(seed)
    x, data, bias, out_features, *rest = inputs
    rows = lamina.ops.unpack_linear_weight(lamina.ops.PackedLinearWeight(data, out_features))
    actual = torch.ops.lamina.linear(*moved((x, rows, bias, out_features, *rest), device))
    suite.check(actual.cpu(), inputs)


def test_linear_has_a_gradient(device, generator):
    x, weight = torch.randn(5, 7, generator=generator), torch.randn(4, 7, generator=generator)
    packed = lamina.ops.PackedLinearWeight(weight.to(device), 4)
    x = x.to(device).requires_grad_()
    lamina.ops.linear(x, packed, activation="relu").sum().backward()
    mask = (x.detach() @ packed.data.T > 0).float()
    assert_exact(x.grad, mask @ packed.data)


@pytest.mark.parametrize("op", ["int8_lstm", "int8_gru"])
def test_int8_recurrent_ops_compute_with_the_dequantized_weights(op, device, generator):
    layer = {"int8_lstm": torch.nn.LSTM, "int8_gru": torch.nn.GRU}[op](6, 10, num_layers=2, bidirectional=True)
    int8 = {"int8_lstm": lamina.nn.Int8LSTM, "int8_gru": lamina.nn.Int8GRU}[op].from_float(layer)
    weights, scales = moved((int8.quantized_weights(), int8.scales()), device)
    x = torch.randn(3, 2, 6, generator=generator)
    arguments = x.to(device), None, weights, scales, True, 2, True
    output, *_ = getattr(lamina.ops, op)(*arguments)
    with torch.no_grad():
        expected, _ = int8.dequantized()(x)
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unbatched", [False, True])
def test_sparse_conv2d_is_the_dense_convolution(unbatched, device, generator):
    weight = torch.randn(6, 4, 3, 3, generator=generator)
    weight[weight.abs() < 1] = 0
    x, bias = torch.randn(2, 4, 9, 8, generator=generator), torch.randn(6, generator=generator)
    x = x[0] if unbatched else x
    packed = lamina.ops.pack_sparse_conv_weight(weight)
    options = {"stride": 2, "padding": 1, "kernel_size": 3, "activation": "relu"}
    rows = weight.permute(0, 2, 3, 1).flatten(1)
    actual = lamina.ops.sparse_conv2d(x.to(device), packed._replace(data=rows.to(device)), bias.to(device), **options)
    expected = torch.nn.functional.conv2d(x, weight, bias, 2, 1).relu()
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert unbatched or actual.is_contiguous(memory_format=torch.channels_last)
