"""lamina._C: tensors come in without a copy, wrong things are refused, and Python runs on while kernels do."""

import gc
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from tolerances import assert_exact

import lamina
from lamina import _C


def unpack(data, k: int = 4, n: int = 2):
    """The smallest call that reads one tensor and writes another."""
    out = torch.full((n, k), 99, dtype=torch.int8)
    _C.int8_linear_unpack(data, out)
    return out


@pytest.fixture
def packed():
    return lamina.ops.pack_int8_weight(torch.arange(8, dtype=torch.int8).reshape(2, 4), torch.ones(2))


def relu_row(x, out=None):
    """int8_linear with an identity weight: takes one float tensor in."""
    packed = lamina.ops.pack_int8_weight(torch.eye(4, dtype=torch.int8), torch.ones(4))
    out = torch.empty(1, 4) if out is None else out
    _C.int8_linear(x, *packed, None, "none", None, None, None, out)
    return out


X = torch.tensor([[127.0, -3.0, 0.0, 64.0]])


class Legacy:
    """A tensor of another library: plain __dlpack__ and nothing else."""

    def __init__(self, tensor, **kwargs):
        self.tensor, self.kwargs = tensor, kwargs

    def __dlpack__(self, **kwargs):
        return self.tensor.__dlpack__(**self.kwargs)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [
        X,
        X.clone().requires_grad_(),
        torch.nn.Parameter(X.clone()),
        X.as_subclass(Subclass),
        X.numpy(),
        np.asfortranarray(X.numpy()),
        Legacy(X),
        Legacy(X, max_version=(1, 0)),
        X.expand(3, 4)[1:2],
        torch.cat([X, X], dim=1)[:, :4],
    ],
    ids=["tensor", "grad", "parameter", "subclass", "numpy", "fortran", "dlpack", "dlpack_1", "expanded", "sliced"],
)
def test_takes_tensors_of_every_kind(tensor):
    assert_exact(relu_row(tensor), X)


def test_inference_tensors():
    with torch.inference_mode():
        assert_exact(relu_row(X.clone()).clone(), X)


def test_writes_into_the_memory_it_is_given():
    whole = np.zeros((3, 6), np.float32)
    relu_row(X, whole[1:2, 1:5])
    assert whole.tolist() == [[0] * 6, [0, 127, -3, 0, 64, 0], [0] * 6]


def test_reads_through_a_byte_offset(packed):
    moved = torch.cat([torch.zeros(3, dtype=torch.int8), packed.data])[3:]
    assert moved.storage_offset() == 3
    assert_exact(unpack(moved), unpack(packed.data))
    assert_exact(unpack(np.concatenate([np.zeros(3, np.int8), packed.data.numpy()])[3:]), unpack(packed.data))


@pytest.mark.parametrize(
    "make", [lambda: torch.ones(1, 4), lambda: np.ones((1, 4), np.float32), lambda: Legacy(torch.ones(1, 4))]
)
def test_keeps_nothing_alive(make):
    thing = make()
    relu_row(thing)
    inner = thing.tensor if isinstance(thing, Legacy) else thing
    before = sys.getrefcount(inner)
    for _ in range(20):
        relu_row(thing)
    gc.collect()
    assert sys.getrefcount(inner) == before
    reference = weakref.ref(inner)
    del thing, inner
    gc.collect()
    assert reference() is None


def test_a_refused_call_keeps_nothing_alive():
    array = np.ones((1, 5), np.float32)
    before = sys.getrefcount(array)
    for _ in range(20):
        with pytest.raises(ValueError, match="int8_linear"):
            relu_row(array)
    assert sys.getrefcount(array) == before


@pytest.mark.parametrize(
    "thing", [[[1.0]], 3.0, "x", b"x", {}, object(), memoryview(b"abcd")], ids=lambda t: type(t).__name__
)
def test_refuses_what_is_no_tensor(thing):
    with pytest.raises(TypeError, match=rf"expected a torch.Tensor, got {type(thing).__name__}$"):
        relu_row(thing)


def test_refuses_none_where_a_tensor_must_be():
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor, got NoneType"):
        relu_row(None)


@pytest.mark.parametrize("fake", [None, 3, "capsule", object()], ids=["None", "3", "capsule", "object"])
def test_a_lying_dlpack_is_an_error_and_not_a_crash(fake):
    class Liar:
        def __dlpack__(self, **kwargs):
            return fake

    with pytest.raises((TypeError, ValueError)):
        relu_row(Liar())


def test_errors_of_dlpack_pass_through():
    class Broken:
        def __dlpack__(self, **kwargs):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        relu_row(Broken())


def test_dtypes_that_kernels_do_not_know_are_named():
    for tensor, name in [
        (X.double(), "float64"),
        (X.half(), "float16"),
        (X.long(), "int64"),
        (X.bool(), "bool"),
        (X.to(torch.uint8), "uint8"),
        (X.to(torch.complex64), "an unsupported dtype"),
        (X.numpy().astype(np.int16), "int16"),
    ]:
        with pytest.raises(ValueError, match=f"^int8_linear: x is {name}, but must be float32 or bfloat16$"):
            relu_row(tensor)


def test_a_lazy_conjugate_is_refused():
    """conj() is a flag on the tensor, and a pointer knows nothing of it; the dtype check comes first."""
    with pytest.raises((ValueError, BufferError, RuntimeError, TypeError)):
        relu_row(torch.ones(1, 4, dtype=torch.complex64).conj())


def test_a_lazy_negative_is_resolved_before_the_op():
    """The imaginary part of a lazy conjugate is float32 with a minus that only a flag tells of."""
    negative = torch.full((1, 4), 2 + 3j).conj().imag
    assert negative.is_neg()
    packed = lamina.ops.pack_int8_weight(torch.eye(4, dtype=torch.int8), torch.ones(4))
    assert_exact(lamina.ops.int8_linear(negative, packed), torch.full((1, 4), -3.0))


@pytest.mark.parametrize("kind", ["meta", "sparse", "fake"])
def test_refuses_tensors_without_memory(kind):
    tensor = {
        "meta": lambda: torch.ones(1, 4, device="meta"),
        "sparse": lambda: torch.ones(1, 4).to_sparse(),
        "fake": lambda: torch._subclasses.FakeTensorMode().from_tensor(torch.ones(1, 4)),
    }[kind]()
    out = torch.full((1, 4), 5.0)
    with pytest.raises((TypeError, ValueError, BufferError, RuntimeError)):
        relu_row(tensor, out)
    assert_exact(out, torch.full((1, 4), 5.0))


def test_wrong_number_of_arguments():
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.int8_linear_unpack(torch.zeros(64, dtype=torch.int8))


# -- the rest of the module


def test_module_lists():
    assert isinstance(_C.with_cuda, bool)
    assert all(isinstance(name, str) for name in _C.available_isas())
    assert _C.active_isa() in _C.available_isas()
    if _C.with_cuda:
        assert isinstance(_C.cuda_devices(), list)


def test_info_agrees_with_the_module():
    info = lamina.info()
    assert info["version"] == lamina.__version__
    assert info["isa"] == _C.active_isa()
    assert info["isas"] == _C.available_isas()
    assert info["threads"] == torch.get_num_threads() == _C.max_threads()
    assert info["backends"][0] == "cpu"
    assert ("cuda" in info["backends"]) == bool(info["cuda_devices"])
    assert info["build"] == {"torch": torch.__version__, "cuda": _C.with_cuda, "cutlass": _C.with_cutlass}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_are_torchs(threads):
    torch.set_num_threads(threads)
    assert _C.max_threads() == threads


def test_the_interpreter_runs_while_a_kernel_does():
    """With the GIL held, the other thread could not take a single step."""
    steps, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            steps[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = steps[0]
        _C.probe_peak("float32", 1, 0.3)
        during = steps[0] - before
    finally:
        stop.set()
        thread.join()
    assert during > 100


@pytest.mark.parametrize("kind", ["float32", "int8", "bf16"])
def test_peaks_are_positive_where_the_machine_has_the_instruction(kind):
    lowest = {"float32": "generic", "int8": "avx512vnni", "bf16": "avx512bf16"}[kind]
    for isa in _C.available_isas():
        with lamina.force_isa(isa):
            peak = _C.probe_peak(kind, 1, 0.01)
        if lowest in _C.available_isas()[: _C.available_isas().index(isa) + 1]:
            assert peak > 0.1
        else:
            assert peak == 0


def test_probes_take_keywords_and_refuse_nonsense():
    assert _C.probe_read_bandwidth(bytes=1 << 20, threads=1, seconds=0.01) > 0
    with pytest.raises(ValueError, match="float64"):
        _C.probe_peak(kind="float64", threads=1, seconds=0.01)


# -- calls that go round PyTorch's dispatcher


def norm(x):
    return lamina.ops.rms_norm(x, x.shape[-1:])


PLAIN = (
    *(torch.randn(2, 3), torch.nn.Parameter(torch.randn(3)), [torch.randn(2), torch.randn(3)]),
    *(None, 1, 2.0, True, "x", (3,), [3], torch.Size([3]), torch.float32),
)


def test_an_ordinary_call_skips_the_dispatcher():
    assert _C.skips_dispatcher(PLAIN)
    with torch.inference_mode():
        assert _C.skips_dispatcher((*PLAIN, torch.randn(2)))
    with torch.no_grad():
        assert _C.skips_dispatcher(PLAIN)
    assert _C.skips_dispatcher(())


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "argument",
    [
        torch.randn(2).as_subclass(Subclass),
        torch.nn.Buffer(torch.randn(2)).as_subclass(Subclass),
        torch.randn(2, device="meta"),
        torch.randn(2, 2, dtype=torch.complex64).conj().imag,
        object(),
        np.ones(3),
    ],
    ids=lambda argument: type(argument).__name__,
)
def test_what_is_not_plain_goes_through_the_dispatcher(argument):
    assert not _C.skips_dispatcher((*PLAIN, argument))
    assert not _C.skips_dispatcher((*PLAIN, [torch.randn(2), argument]))


def test_a_lazy_negation_is_seen():
    x = torch.randn(4, 6, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    assert_exact(norm(x), norm(x.resolve_neg().clone()))


def test_modes_and_tracers_see_the_call():
    x = torch.randn(4, 6)
    expected = norm(x)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Listen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for mode in (Watch, Listen):
        seen = []
        with mode():
            assert_exact(norm(x), expected)
        assert torch.ops.lamina.rms_norm.default in seen, mode

    q, other = torch.randn(2, 1, 2, 5, 8).unbind()
    traced = torch.jit.trace(lambda q: lamina.ops.attention(q, q, q), (q,), check_trace=False)
    assert "lamina::attention" in str(traced.graph)
    assert_exact(traced(other), lamina.ops.attention(other, other, other))

    graph = torch.fx.experimental.proxy_tensor.make_fx(norm)(x)
    assert torch.ops.lamina.rms_norm.default in {node.target for node in graph.graph.nodes}

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        norm(x)
    assert "lamina::rms_norm" in {event.name for event in profile.events()}

    assert not torch.func.functionalize(lambda t: torch.tensor(_C.skips_dispatcher((t,))))(x)
    assert _C.skips_dispatcher((x,))
