"""What a graph of a GPU looks like, captured without one: fake tensors that say they are on it.

Only gradients are missing: torch's autograd asks such a tensor for the stream of a device that is not there.
"""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import lamina
from lamina.integrations import sdpa
from lamina.ops.attention import drop_in_attention

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU its own tests say it by real tensors")


def gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def ints(*shape: int) -> torch.Tensor:
    return gpu(*shape, dtype=torch.int32)


def int8_weight() -> "lamina.ops.PackedInt8Weight":
    return lamina.ops.PackedInt8Weight(gpu(48, 32, dtype=torch.int8), gpu(48, dtype=torch.float32), ints(0))


OPS = {
    "attention": (lambda: lamina.ops.attention(gpu(2, 4, 9, 16), gpu(2, 4, 7, 16), gpu(2, 4, 7, 24)), (2, 4, 9, 24)),
    "attention float32, masked, grouped": (
        lambda: lamina.ops.attention(
            *(gpu(2, h, 9, 16, dtype=torch.float32) for h in (4, 2, 2)),
            attn_mask=gpu(2, 1, 9, 9, dtype=torch.bool),
            enable_gqa=True,
        ),
        (2, 4, 9, 16),
    ),
    "attention with options": (
        lambda: lamina.ops.attention(*[gpu(2, 4, 9, 16)] * 3, is_causal=True, window=(3, 0), softcap=9.0),
        (2, 4, 9, 16),
    ),
    "attention_varlen": (
        lambda: lamina.ops.attention_varlen(gpu(12, 4, 16), *[gpu(12, 2, 16)] * 2, ints(3), ints(3), 7, 7),
        (12, 4, 16),
    ),
    "attention_decode": (
        lambda: lamina.ops.attention_decode(gpu(3, 1, 4, 64), *[gpu(3, 50, 2, 64)] * 2, ints(3)),
        (3, 1, 4, 64),
    ),
    "attention_decode of pages": (
        lambda: lamina.ops.attention_decode(
            gpu(3, 1, 4, 64), *[gpu(20, 16, 2, 64)] * 2, ints(3), block_table=ints(3, 5)
        ),
        (3, 1, 4, 64),
    ),
    "int8_linear": (lambda: lamina.ops.int8_linear(gpu(5, 32), int8_weight(), gpu(48)), (5, 48)),
}


@pytest.mark.parametrize("name", OPS)
def test_ops(name):
    run, shape = OPS[name]
    with FakeTensorMode():
        result = run()
    assert result.shape == shape
    assert result.device == torch.device("cuda:0")
    assert result.dtype is (torch.float32 if "float32" in name else torch.bfloat16)


def test_the_log_sum_exp_is_of_float32():
    with FakeTensorMode():
        q = gpu(2, 4, 9, 16)
        out, lse = lamina.ops.attention(q, q, q, return_lse=True)
    assert (out.dtype, lse.dtype, lse.shape, lse.is_cuda) == (torch.bfloat16, torch.float32, (2, 4, 9), True)


# -- layers


def on_gpu(layer: nn.Module) -> nn.Module:
    """The layer with parameters on a GPU."""
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty_like(parameter, device="cuda")
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
    return layer.eval()


def layers() -> dict[str, tuple[nn.Module, tuple]]:
    """Name -> layer and arguments, on a GPU."""
    # What draws first values would need the GPU.
    at = {"batch_first": True, "device": "meta", "dtype": torch.bfloat16}
    encoder = on_gpu(lamina.nn.TransformerEncoderLayer(64, 4, 96, **at))
    heads = on_gpu(lamina.nn.MultiheadAttention(64, 4, **at))
    x, padding = gpu(2, 9, 64), gpu(2, 9, dtype=torch.bool)
    return {
        "MultiheadAttention": (heads, (x, x, x, padding, False)),
        "ScaledDotProductAttention": (lamina.nn.ScaledDotProductAttention(), (gpu(2, 9, 4, 16),) * 3),
        "TransformerEncoderLayer": (encoder, (x, None, padding)),
    }


@pytest.mark.parametrize("name", ["MultiheadAttention", "ScaledDotProductAttention", "TransformerEncoderLayer"])
def test_layers(name):
    with FakeTensorMode(), torch.no_grad():
        layer, arguments = layers()[name]
        result = layer(*arguments)
        result = result[0] if isinstance(result, tuple) else result
    assert (result.shape, result.dtype, str(result.device)) == (arguments[0].shape, torch.bfloat16, "cuda:0")


# -- graphs: where a call of attention goes


def graph_of(function, *inputs) -> set[str]:
    """The ops that make_fx sees."""
    with inputs[0].fake_mode, torch.no_grad():
        captured = make_fx(function)(*inputs)
    return {str(node.target) for node in captured.graph.nodes if node.op == "call_function"}


def fakes(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    with FakeTensorMode():
        return [gpu(*shape, dtype=dtype) for shape in shapes]


PLAIN = ((2, 4, 9, 16),) * 3
OURS = "lamina.attention.default"
# Calls that torch has a flash kernel for, and calls for which it has none.
FLASH = {
    "plain": (PLAIN, torch.bfloat16, {}),
    "causal": (PLAIN, torch.float16, {"is_causal": True, "scale": 0.3}),
    "cross": (((2, 4, 9, 16), (2, 4, 7, 16), (2, 4, 7, 16)), torch.bfloat16, {}),
    "grouped": (((2, 4, 9, 16), (2, 2, 9, 16), (2, 2, 9, 16)), torch.bfloat16, {"enable_gqa": True}),
}
NO_FLASH = {
    "float32": (PLAIN, torch.float32, {}),
    "masked": (PLAIN, torch.bfloat16, {"attn_mask": True}),
    "causal, not square": (((2, 4, 9, 16), (2, 4, 7, 16), (2, 4, 7, 16)), torch.bfloat16, {"is_causal": True}),
    "values of another size": (((2, 4, 9, 16), (2, 4, 9, 16), (2, 4, 9, 24)), torch.bfloat16, {}),
    "three dimensions": (((4, 9, 16),) * 3, torch.bfloat16, {}),
}


def of_call(function, case) -> set[str]:
    shapes, dtype, options = case
    tensors = fakes(*shapes, dtype=dtype)
    if "attn_mask" not in options:
        return graph_of(lambda *t: function(*t, **options), *tensors)
    with tensors[0].fake_mode:
        mask = gpu(9, 9, dtype=torch.bool)
    return graph_of(lambda q, k, v, m: function(q, k, v, attn_mask=m), *tensors, mask)


@pytest.mark.parametrize("name", [*FLASH, *NO_FLASH])
def test_a_model_s_call_is_torchs_where_torch_has_a_flash_kernel(name):
    assert (OURS in of_call(drop_in_attention, {**FLASH, **NO_FLASH}[name])) is (name in NO_FLASH)
    assert OURS in of_call(lamina.ops.attention, {**FLASH, **NO_FLASH}[name])


def test_options_are_laminas():
    called = graph_of(lambda q, k, v: drop_in_attention(q, k, v, softcap=9.0), *fakes(*PLAIN))
    assert "lamina.attention.with_lse" in called


@pytest.fixture
def active():
    sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("lamina")
    yield
    torch.nn.attention.restore_flash_attention_impl()


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("name", [*FLASH, *NO_FLASH])
def test_torchs_op_is_laminas_where_torch_has_no_flash_kernel(name):
    case = {**FLASH, **NO_FLASH}[name]
    assert (OURS in of_call(F.scaled_dot_product_attention, case)) is (name in NO_FLASH)
    torch.nn.attention.restore_flash_attention_impl()
    assert OURS not in of_call(F.scaled_dot_product_attention, case)


@pytest.mark.usefixtures("active")
def test_torchs_op_stays_torchs_where_lamina_has_no_kernel():
    assert OURS not in of_call(F.scaled_dot_product_attention, (((2, 4, 9, 320),) * 3, torch.bfloat16, {}))
    assert OURS not in of_call(F.scaled_dot_product_attention, (PLAIN, torch.float64, {}))


class Masked(nn.Module):
    def forward(self, q, keep):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=keep)


def masked_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    with FakeTensorMode():
        return gpu(2, 4, 9, 16), gpu(2, 1, 1, 9, dtype=torch.bool)


def compiled(model: nn.Module) -> set[str]:
    from torch._dynamo.backends.common import aot_autograd

    seen = set()

    def note(graph, inputs):
        seen.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    q, keep = masked_inputs()
    with q.fake_mode, torch.no_grad():
        out = torch.compile(model, backend=aot_autograd(fw_compiler=note), fullgraph=True)(q, keep)
    assert out.shape == (2, 4, 9, 16)
    assert out.is_cuda
    return seen


@pytest.mark.usefixtures("active")
def test_torch_compile_of_torchs_op():
    assert OURS in compiled(Masked())
    torch.nn.attention.restore_flash_attention_impl()
    assert OURS not in compiled(Masked())


def test_torch_compile_and_export_of_a_rewritten_model():
    model = Masked()
    lamina.swap_(model, lamina.FusedAttention())
    assert OURS in compiled(model)
    exported = torch.export.export(model, masked_inputs())
    assert OURS in {str(node.target) for node in exported.graph.nodes}


def test_export_of_layers():
    with FakeTensorMode(), torch.no_grad():
        layer, arguments = layers()["TransformerEncoderLayer"]
    exported = torch.export.export(layer, arguments)
    assert OURS in {str(node.target) for node in exported.run_decompositions({}).graph.nodes}
