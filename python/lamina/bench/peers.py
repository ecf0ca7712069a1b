"""Other ways to make a PyTorch model fast on this machine, each behind the same small interface.

A peer converts an eager module. One that is not installed says so, one that fails is reported with its message; neither
is ever left out of a table in silence. Thread counts follow torch's at the moment of `prepare`.
"""

import contextlib
import copy
import importlib.util
import io
import logging
import os
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from lamina.bench.modules import caller, first_tensor


class Peer(Protocol):
    """Something that turns an eager module into a faster callable.

    `quantizes`: it works on weights, so a module without any is none of its business.
    """

    name: str
    quantizes: bool

    def available(self) -> str | None:
        """None when the peer can run here, else the reason in one sentence."""

    def prepare(self, module: torch.nn.Module, example_inputs: tuple | dict) -> Callable[[], Any]:
        """Convert the module and return a closure that runs it on the example inputs."""


class Unavailable(RuntimeError):
    """A peer that can't run here; the message is the whole reason."""


def convert(peer: Peer, module: torch.nn.Module, example_inputs: tuple | dict) -> Callable[[], Any]:
    """`peer.prepare`, or Unavailable with the peer's reason. Example: `convert(PEERS["ort int8"], model, (x,))()`."""
    reason = peer.available()
    if reason is not None:
        raise Unavailable(reason)
    return peer.prepare(module, example_inputs)


def quantize_dynamic(module: torch.nn.Module) -> torch.nn.Module:
    """A copy with torch.ao's dynamic int8 Linear, LSTM and GRU layers: the fastest eager int8 PyTorch ships today."""
    with _quiet():
        # The conversion replaces children, never the root, so a bare layer is wrapped first.
        wrapped = torch.nn.ModuleList([copy.deepcopy(module)])
        converted = torch.ao.quantization.quantize_dynamic(
            wrapped, {torch.nn.Linear, torch.nn.LSTM, torch.nn.GRU}, dtype=torch.qint8
        )
    return converted[0]


class QuantizeDynamic:
    """torch.ao.quantization.quantize_dynamic."""

    name = "quantize_dynamic"
    quantizes = True

    def available(self) -> str | None:
        return None if hasattr(torch, "ao") else "this torch no longer has torch.ao.quantization"

    def prepare(self, module: torch.nn.Module, example_inputs: tuple | dict) -> Callable[[], Any]:
        return caller(quantize_dynamic(module), example_inputs)


class TorchCompile:
    """torch.compile with its default backend, float32."""

    name = "torch.compile"
    quantizes = False

    def available(self) -> str | None:
        return None

    def prepare(self, module: torch.nn.Module, example_inputs: tuple | dict) -> Callable[[], Any]:
        return _compiled(copy.deepcopy(module), example_inputs)


class TorchaoInt8:
    """torchao's dynamic int8 of the Linear layers, compiled (its eager path is not fused)."""

    name = "torchao int8"
    quantizes = True

    def available(self) -> str | None:
        return _not_installed("torchao")

    def prepare(self, module: torch.nn.Module, example_inputs: tuple | dict) -> Callable[[], Any]:
        wrapped = torch.nn.ModuleList([copy.deepcopy(module)])
        with _quiet():
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            quantize_(wrapped, Int8DynamicActivationInt8WeightConfig())
        return _compiled(wrapped[0], example_inputs)


class OnnxRuntime:
    """ONNX Runtime on the exported module: in float32, or with int8 of its own, dynamic or static.

    form: "float32", "dynamic int8" or "static int8", see `exported`.
    """

    def __init__(self, name: str, form: str):
        self.name, self.form = name, form
        self.quantizes = form != "float32"

    def available(self) -> str | None:
        return _not_installed("onnxruntime", "onnx", "onnxscript")

    def prepare(self, module: torch.nn.Module, example_inputs: tuple | dict) -> Callable[[], Any]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # A pool that spins between calls would take the cores from the contenders timed in between.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        content = exported(module, example_inputs, self.form)
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        arrays = _arrays(example_inputs)
        wanted = {item.name for item in session.get_inputs()}
        feed = {name: array for name, array in arrays.items() if name in wanted}
        return lambda: session.run(None, feed)


class OpenVino:
    """OpenVINO, in float32."""

    name = "openvino"
    quantizes = False

    def available(self) -> str | None:
        return _not_installed("openvino")

    def prepare(self, module: torch.nn.Module, example_inputs: tuple | dict) -> Callable[[], Any]:
        import openvino

        names, values = _named(example_inputs)
        with _quiet():
            converted = openvino.convert_model(_Positional(module, names), example_input=values)
        request = _openvino_request(converted)
        arrays = [value.numpy() for value in values]
        return lambda: request.infer(arrays)


class OpenVinoInt8:
    """OpenVINO on the model that ONNX Runtime's tool quantized: both fuse its quantized layers, each in its own way.

    The quantization is that of `lamina.Int8Static`: weights symmetric per output channel, one scale for all of a
    layer's input, found on the example inputs; except that codes are unsigned, as OpenVINO's kernels like them best
    (signed ones cost it 11 to 13% on ResNets).
    """

    name = "openvino int8"
    quantizes = True

    def available(self) -> str | None:
        return _not_installed("openvino", "onnxruntime", "onnx", "onnxscript")

    def prepare(self, module: torch.nn.Module, example_inputs: tuple | dict) -> Callable[[], Any]:
        import openvino

        content = exported(module, example_inputs, "static int8")
        request = _openvino_request(openvino.Core().read_model(content, b""))
        arrays = _arrays(example_inputs)
        feed = {name: array for name, array in arrays.items() if any(name in i.names for i in request.model_inputs)}
        return lambda: request.infer(feed)


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        QuantizeDynamic(),
        TorchCompile(),
        TorchaoInt8(),
        OnnxRuntime("ort", "float32"),
        OnnxRuntime("ort int8", "dynamic int8"),
        OnnxRuntime("ort static int8", "static int8"),
        OpenVino(),
        OpenVinoInt8(),
    )
}


class _Positional(torch.nn.Module):
    """The module with positional inputs and its first tensor as the output: what exporters understand."""

    def __init__(self, module: torch.nn.Module, names: Sequence[str] | None):
        super().__init__()
        self.module = copy.deepcopy(module).eval()
        self.names = names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        output = (
            self.module(*inputs) if self.names is None else self.module(**dict(zip(self.names, inputs, strict=True)))
        )
        return first_tensor(output)


def _named(example_inputs: tuple | dict) -> tuple[list[str] | None, tuple[torch.Tensor, ...]]:
    """Keyword names, if there are any, and the tensors."""
    if isinstance(example_inputs, dict):
        return list(example_inputs), tuple(example_inputs.values())
    return None, tuple(example_inputs)


def _compiled(module: torch.nn.Module, example_inputs: tuple | dict) -> Callable[[], Any]:
    torch._dynamo.reset()
    call = caller(torch.compile(module), example_inputs)
    with _quiet():
        call()  # this is when it compiles
    return call


def _arrays(example_inputs: tuple | dict) -> dict[str, Any]:
    """The inputs as NumPy arrays, by the names that they have in ONNX."""
    names, values = _named(example_inputs)
    names = names or [f"input{i}" for i in range(len(values))]
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}


def _openvino_request(model: Any) -> Any:
    import openvino

    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.compile_model(model, "CPU", threads).create_infer_request()


# module -> (form, names and shapes of the inputs) -> serialized model
_exported: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple, bytes]] = weakref.WeakKeyDictionary()


def exported(module: torch.nn.Module, example_inputs: tuple | dict, form: str) -> bytes:
    """The module as a serialized ONNX model for inputs of these sizes.

    form: "float32"; "dynamic int8" and "static int8" are what ONNX Runtime's own tool makes of it: the one with int8
    weights and inputs quantized on the fly, the other (QDQ, per channel) with scales found on the example inputs.

    Exporting a large model takes half a minute, so what came out is kept for as long as the module lives: the same
    module at other thread counts or for another peer is not exported again.
    """
    arrays = _arrays(example_inputs)
    key = form, *((name, array.shape, array.dtype) for name, array in arrays.items())
    known = _exported.setdefault(module, {})
    if key not in known:
        with tempfile.TemporaryDirectory(prefix="lamina-peer-") as folder:
            path = os.path.join(folder, "model.onnx")
            _export_onnx(module, example_inputs, path)
            whole = _whole_onnx(path)
            match form:
                case "dynamic int8":
                    whole = _quantize_onnx(whole)
                case "static int8":
                    whole = _quantize_onnx_statically(whole, arrays)
            known[key] = Path(whole).read_bytes()
    return known[key]


def _export_onnx(module: torch.nn.Module, example_inputs: tuple | dict, path: str) -> None:
    names, values = _named(example_inputs)
    input_names = list(_arrays(example_inputs))
    with _quiet():
        torch.onnx.export(
            _Positional(module, names), args=values, f=path, input_names=input_names, dynamo=True, verbose=False
        )


def _whole_onnx(path: str) -> str:
    """The model and its weights, which the exporter writes apart, in one file; returns the path of it."""
    import onnx

    model = onnx.load(path)
    # The exporter notes the shapes of intermediate values, the quantizer transposes weights and then trips over them.
    del model.graph.value_info[:]
    whole = f"{path}.whole"
    onnx.save(model, whole)
    return whole


def _quantize_onnx(path: str) -> str:
    """Dynamic int8 by ONNX Runtime's own tool; returns the path of the new file beside the old."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    quantized = f"{path}.int8"
    with _quiet():
        quantize(_folded_onnx(path), quantized, weight_type=QuantType.QInt8)
    return quantized


def _quantize_onnx_statically(path: str, arrays: Mapping[str, Any]) -> str:
    """Static int8 by ONNX Runtime's own tool, calibrated on `arrays`; returns the path of the new file beside the old.

    The pairs of QuantizeLinear and DequantizeLinear that it leaves around each layer are what ONNX Runtime and OpenVINO
    make int8 layers of.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Once(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([dict(arrays)])

        def get_next(self) -> Mapping[str, Any] | None:
            return next(self.left, None)

    quantized = f"{path}.int8"
    with _quiet():
        quantize_static(
            path,
            quantized,
            Once(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return quantized


def _folded_onnx(path: str) -> str:
    """The model with the weights of LSTM layers as constants; returns the path of it.

    The exporter has them behind slices, where the quantizer does not look: it would leave the layers float.
    """
    import onnx
    import onnxruntime

    if all(node.op_type != "LSTM" for node in onnx.load(path).graph.node):
        return path
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = f"{path}.folded"
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return options.optimized_model_filepath


def _not_installed(*packages: str) -> str | None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed (pip install lamina[peers])"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what converters print and warn about while they work: it concerns them, not the measurement."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
