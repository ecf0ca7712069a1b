"""Where lamina's tensors are: what fakes promise of a GPU, what is refused there, and how packed weights move."""

import sys

import pytest
import torch
from test_every_op import op_of, outputs, tagged
from tolerances import assert_exact
from torch import nn
from torch.utils._pytree import tree_map_only

import lamina
from lamina.nn.packed_weight import repacks
from lamina.ops.library import CUDA_IMPLEMENTATIONS
from lamina.stopwatch import device_of, in_turns, on_cpu, stopwatch_of


def on_gpu(t: torch.Tensor) -> torch.Tensor:
    """A tensor of that form that pretends to be on a GPU."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")


@tagged("bf16", most=1)
def test_fakes_of_a_gpu_are_on_it(suite, case, seed):
    """torch.compile believes them: a wrong device would end in a copy, or in an error at run time."""
    inputs = case.inputs(seed)
    with torch._subclasses.FakeTensorMode():
        result = op_of(suite)(*tree_map_only(torch.Tensor, on_gpu, inputs))
    assert {str(output.device) for output in outputs(result)} == {"cuda:0"}


def test_ops_without_kernels_for_gpus_say_so():
    missing = {"token_panels", "token_panels.rows", "layer_norm.panels", "sparse_int8_linear.panels"}
    assert not missing & CUDA_IMPLEMENTATIONS.keys()
    for name in missing:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.lamina, packet), overload or "default")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CUDA"), name


# Public functions that take tensors as they are: none may reach a kernel of the CPU with tensors of a GPU.
X = (2, 4, 6, 6)
CALLS = {
    "attention": lambda t: lamina.ops.attention(t(1, 2, 5, 16), t(1, 2, 5, 16), t(1, 2, 5, 16)),
    "concatenate": lambda t: lamina.ops.concatenate([t(*X), t(*X)], 1),
    "conv2d": lambda t: lamina.ops.conv2d(t(*X), t(8, 4, 3, 3), t(8), padding=1, activation="relu", pool=("max", 2)),
    "copy": lambda t: lamina.ops.copy(t(*X), dtype=torch.bfloat16),
    "elementwise": lambda t: lamina.ops.elementwise([t(*X), t(6)], [("add", 0, 1), ("gelu", 2)]),
    "embedding": lambda t: lamina.ops.embedding(t(3).long(), t(9, 4)),
    "group_norm": lambda t: lamina.ops.group_norm(t(*X), 2, t(4), t(4), activation="silu"),
    "layer_norm": lambda t: lamina.ops.layer_norm(t(*X), (6,), t(6), t(6), residual=t(*X)),
    "linear": lambda t: lamina.ops.linear(t(3, 4), lamina.ops.pack_linear_weight(t(6, 4)), t(6)),
    "lstm": lambda t: lamina.ops.lstm(t(3, 2, 4), None, [t(20, 4), t(20, 5), t(20), t(20)])[0],
    "pool2d": lambda t: lamina.ops.pool2d(t(*X), "max", 3, 2, 1),
    "reduce": lambda t: lamina.ops.reduce(t(*X), (2, 3), "mean"),
    "rms_norm": lambda t: lamina.ops.rms_norm(t(*X), (6,), t(6)),
    "rnn_tanh": lambda t: lamina.ops.rnn_tanh(t(3, 2, 4), None, [t(5, 4), t(5, 5), t(5), t(5)])[0],
    "softmax": lambda t: lamina.ops.softmax(t(*X), 1),
}


@pytest.mark.parametrize("op", CALLS)
def test_public_functions_take_tensors_of_a_gpu(op):
    with torch._subclasses.FakeTensorMode():
        assert CALLS[op](lambda *shape: torch.empty(shape, device="cuda")).is_cuda


# -- packed weights


def test_a_weight_is_packed_anew_between_a_cpu_and_a_gpu():
    for here, there, expected in (
        *(("cpu", "cuda", True), ("cuda", "cpu", True), ("cuda", "meta", True), ("meta", "cuda", True)),
        *(("cpu", "cpu", False), ("cuda", "cuda", False), ("cpu", "meta", False), ("meta", "cpu", False)),
    ):
        assert repacks(here, there) is expected, (here, there)


LAYERS = {
    "Int8Linear": lambda: lamina.nn.Int8Linear.from_float(nn.Linear(20, 33), "relu"),
    "Int8WeightOnlyLinear": lambda: lamina.nn.Int8WeightOnlyLinear.from_float(nn.Linear(20, 128)),
}


def as_on_a_gpu(layer: nn.Module) -> nn.Module:
    """The layer with its weight in the form of a GPU, although on the CPU."""
    rows = lamina.ops.unpack_int8_weight(layer.packed_weight, layer.in_features)
    layer._set_packed(layer.packed_weight._replace(data=rows))
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_a_gpu_has_the_state_dict_of_the_cpu(name):
    layer = LAYERS[name]()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    weight = layer.weight.clone()
    moved = as_on_a_gpu(layer)
    assert moved._packed.shape == (layer.out_features, layer.in_features)
    assert_exact(moved.weight.clone(), weight)
    assert moved.state_dict().keys() == state.keys()
    for key, value in moved.state_dict().items():
        assert_exact(value, state[key], key)
    fresh = LAYERS[name]()
    fresh.load_state_dict(moved.state_dict())
    assert fresh._packed.ndim == 1
    assert_exact(fresh._codes(), moved._codes())


def test_part_of_a_layer_of_a_gpu_is_rows_of_its_weight(monkeypatch):
    layer, x = as_on_a_gpu(LAYERS["Int8WeightOnlyLinear"]()), torch.randn(3, 20)
    seen = []
    monkeypatch.setattr(type(layer), "_multiply", lambda self, input, packed, bias: seen.append((packed, bias)))
    layer.part(x, slice(64, 128))
    ((packed, bias),) = seen
    assert_exact(packed.data, layer._packed[64:])
    assert_exact(packed.scale, layer._scale[64:])
    assert_exact(bias, layer.bias[64:])


def test_lora_merges_into_a_layer_of_a_gpu():
    base = as_on_a_gpu(LAYERS["Int8WeightOnlyLinear"]())
    before = base._codes()
    lora = lamina.nn.LoRALinear(base, rank=2)
    nn.init.normal_(lora.lora_b)
    lora.merge()
    lora.unmerge()
    assert_exact(base._codes(), before)


def test_the_float_weight_of_a_layer_says_where_it_is():
    with torch._subclasses.FakeTensorMode():
        like = torch.empty(0, device="cuda")
    weight = lamina.nn.dequantized.DequantizedWeight((3, 4), torch.float32, lambda: None, like.device)
    assert weight.is_cuda
    assert weight.shape == (3, 4)


def test_moving_to_meta_and_other_dtypes_leaves_the_form():
    layer = LAYERS["Int8Linear"]()
    packed = layer._packed.clone()
    layer.to(torch.bfloat16)
    assert_exact(layer._packed, packed)
    assert layer._scale.dtype is torch.float32
    layer.to("meta")
    assert layer._packed.is_meta
    assert layer._packed.shape == packed.shape


# -- clocks


def test_the_device_is_the_one_gpu_of_a_model():
    assert device_of([torch.ones(1)]) == torch.device("cpu")
    assert device_of([]) == torch.device("cpu")
    with torch._subclasses.FakeTensorMode():
        one, other = (torch.empty(1, device=device) for device in ("cuda:0", "cuda:1"))
    assert device_of([torch.ones(1), one]) == torch.device("cuda:0")
    with pytest.raises(ValueError, match="the tensors are on cuda:0 and cuda:1, but only work on one GPU can be timed"):
        device_of([one, other])


def test_stopwatches():
    assert stopwatch_of(torch.device("cpu")) is on_cpu
    assert stopwatch_of(torch.device("cuda", 0)).device == torch.device("cuda", 0)
    ticks = iter([1.0, 3.0])
    calls = []
    assert on_cpu(lambda: calls.append(1), 4, lambda: next(ticks)) == 0.5
    assert len(calls) == 4


def test_candidates_take_turns():
    order = []
    times = in_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0, 2, lambda run, n: run() or 1
    )
    assert order == ["a", "b"] * 3  # one round for nothing
    assert times == {"a": [1, 1], "b": [1, 1]}


def test_accelerate_says_why_no_graph_is_tried_on_a_gpu():
    from lamina.compile import NOT_FOR_GPUS, _not_ours

    with torch._subclasses.FakeTensorMode():
        reason = _not_ours([torch.empty(2, device="cuda")])
    assert reason == f"its tensors are on cuda:0, and {NOT_FOR_GPUS}"


# -- accelerate and swap_


def test_a_model_on_a_gpu_is_accelerated_by_what_runs_there(monkeypatch):
    """All of it but the GPU: what is tried, how it is timed, and what the report says."""
    module = sys.modules["lamina.accelerate"]
    stopwatch = object()
    timed = []

    def interleaved(before, after, seconds, watch):
        before(), after()
        timed.append(watch)
        return 2.0, 1.0

    monkeypatch.setattr(module, "_interleaved", interleaved)
    monkeypatch.setattr(module, "device_of", lambda tensors: torch.device("cuda", 0))
    monkeypatch.setattr(module, "stopwatch_of", lambda device: stopwatch if device.type == "cuda" else None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Conv1d(64, 4, 1)).eval()
    report = lamina.accelerate(nn.Sequential(model[0], model[1]), (torch.randn(4, 64),)).report
    assert set(map(id, timed)) == {id(stopwatch)}
    assert report.device == "Test GPU"
    assert "ms, Test GPU)" in report.summary()
    (form,) = [form for form in report.forms if form.name == "compiled"]
    assert form.reason == "not tried on cuda:0: fusions and plans are for the CPU"
    assert form.speedup is None
    assert report.form == "swapped layers"


def test_a_graph_of_the_cpu_is_not_for_tensors_of_a_gpu():
    """An accelerated model may be moved: then its layers run, and not the graph that was made for the CPU."""
    describe = sys.modules["lamina.accelerate"]._describe
    with torch._subclasses.FakeTensorMode():
        assert describe(torch.empty(2, 3)) != describe(torch.empty(2, 3, device="cuda"))
        assert describe(torch.empty(2, 3)) == describe(torch.empty(2, 3))


def test_what_a_gpu_is_tried_with():
    kinds = {type(config) for config in lamina.configs.AUTO_ON_GPU}
    assert kinds == {lamina.Int8Dynamic, lamina.Int8WeightOnly, lamina.FusedAttention, lamina.Sparse}


def test_layers_are_left_where_nothing_runs(monkeypatch):
    off = sys.modules["lamina.swap"]._off
    here, there, nowhere = torch.device("cpu"), torch.device("cuda:0"), torch.device("meta")
    monkeypatch.setattr(sys.modules["lamina.swap"], "has_triton", lambda: True)
    assert off(here, "int8 kernels") is None
    assert off(there, "int8 kernels") is None
    assert off(nowhere, "int8 kernels") == "on meta, and int8 kernels run on the CPU and on GPUs"
    assert off(there, "fused GRU kernels", on_gpu=False) == "on cuda:0, and fused GRU kernels run on the CPU"
    monkeypatch.setattr(sys.modules["lamina.swap"], "has_triton", lambda: False)
    assert off(there, "int8 kernels") == "on cuda:0, and int8 kernels need Triton there, which is not installed"
