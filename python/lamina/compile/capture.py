"""What Dynamo hands over, and how its nodes are read.

The passes work on Dynamo's own graph, before AOT autograd takes it apart: a GELU is one node, a linear layer is one
node, and parameters and buffers are inputs of the graph, told from the caller's tensors by Dynamo's mark. One meaning
has many spellings there (`x + y`, `torch.add`, `x.add(y)`, `x += y`); `kind` maps them to one word and `operands` to
one order of arguments, so that the passes know no spelling.

Anything that writes to a tensor is a barrier: nodes are fused across it never, because the fused call runs where the
last of them stood.
"""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._prims_common import is_channels_last_contiguous_or_false, is_contiguous_or_false
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

import lamina.ops  # noqa: F401  (registers the ops this module names)

_FUNCTIONS: dict[Any, str] = {
    F.linear: "linear",
    torch.addmm: "addmm",
    torch.ops.lamina.int8_linear.default: "int8_linear",
    torch.ops.lamina.sparse_int8_linear.default: "sparse_int8_linear",
    torch.conv2d: "conv2d",
    torch.ops.lamina.conv2d.default: "lamina_conv2d",
    torch.ops.lamina.int8_conv2d.default: "int8_conv2d",
    torch.ops.lamina.int8_pool2d.default: "int8_pool2d",
    F.batch_norm: "batch_norm",
    F.max_pool2d: "max_pool2d",
    torch.max_pool2d: "max_pool2d",
    F.avg_pool2d: "avg_pool2d",
    F.adaptive_avg_pool2d: "adaptive_avg_pool2d",
    F.pad: "pad",
    torch._C._nn.pad: "pad",
    F.scaled_dot_product_attention: "attention",
    F.layer_norm: "layer_norm",
    torch.layer_norm: "layer_norm",
    F.rms_norm: "rms_norm",
    torch.rms_norm: "rms_norm",
    F.dropout: "dropout",
    torch.dropout: "dropout",
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.relu6: "relu6",
    F.hardtanh: "hardtanh",
    F.hardswish: "hardswish",
    F.softmax: "softmax",
    torch.softmax: "softmax",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    torch.rsqrt: "rsqrt",
    operator.add: "add",
    operator.iadd: "iadd",
    torch.add: "add",
    operator.mul: "mul",
    torch.mul: "mul",
    operator.truediv: "div",
    torch.div: "div",
    operator.pow: "pow",
    torch.pow: "pow",
    torch.square: "square",
    torch.mean: "mean",
    torch.matmul: "matmul",
    operator.matmul: "matmul",
    torch.bmm: "matmul",
    torch.where: "where",
    torch.masked_fill: "masked_fill",
    torch.transpose: "transpose",
    torch.cat: "cat",
    torch.concat: "cat",
    torch.tensor: "tensor",
    torch.reshape: "view",
    torch.flatten: "view",
    torch.split: "split",
    torch.split_with_sizes: "split",
    operator.getitem: "getitem",
}
_METHODS: dict[str, str] = {
    **{name: name for name in ("add", "mul", "div", "pow", "square", "mean", "matmul", "rsqrt", "tanh", "sigmoid")},
    **{name: name for name in ("relu", "softmax", "masked_fill", "transpose", "where", "contiguous", "split")},
    "bmm": "matmul",
    "view": "view",
    "reshape": "view",
    "unflatten": "view",
    "flatten": "view",
    "to": "to",
    "type": "to",
    "type_as": "to",
    "float": "to",
    "bfloat16": "to",
}
# The names and defaults of what follows the first argument, where a pass reads more than that.
_PARAMETERS: dict[str, tuple[tuple[str, Any], ...]] = {
    "linear": (("input", None), ("weight", None), ("bias", None)),
    "addmm": (("input", None), ("mat1", None), ("mat2", None), ("beta", 1), ("alpha", 1)),
    "attention": (
        ("query", None),
        ("key", None),
        ("value", None),
        ("attn_mask", None),
        ("dropout_p", 0.0),
        ("is_causal", False),
        ("scale", None),
        ("enable_gqa", False),
    ),
    "layer_norm": (("input", None), ("normalized_shape", None), ("weight", None), ("bias", None), ("eps", 1e-5)),
    "rms_norm": (("input", None), ("normalized_shape", None), ("weight", None), ("eps", None)),
    "dropout": (("input", None), ("p", 0.5), ("training", True), ("inplace", False)),
    "gelu": (("input", None), ("approximate", "none")),
    "softmax": (("input", None), ("dim", None), ("_stacklevel", 3), ("dtype", None)),
    "mean": (("input", None), ("dim", None), ("keepdim", False)),
    "transpose": (("input", None), ("dim0", None), ("dim1", None)),
    "masked_fill": (("input", None), ("mask", None), ("value", None)),
    "where": (("condition", None), ("input", None), ("other", None)),
    "add": (("input", None), ("other", None), ("alpha", 1)),
    "mul": (("input", None), ("other", None)),
    "div": (("input", None), ("other", None), ("rounding_mode", None)),
    "pow": (("input", None), ("exponent", None)),
    "matmul": (("input", None), ("mat2", None)),
    "cat": (("tensors", None), ("dim", 0)),
    "hardtanh": (("input", None), ("min_val", -1.0), ("max_val", 1.0), ("inplace", False)),
    "conv2d": (
        ("input", None),
        ("weight", None),
        ("bias", None),
        ("stride", 1),
        ("padding", 0),
        ("dilation", 1),
        ("groups", 1),
    ),
    "batch_norm": (
        ("input", None),
        ("running_mean", None),
        ("running_var", None),
        ("weight", None),
        ("bias", None),
        ("training", False),
        ("momentum", 0.1),
        ("eps", 1e-5),
    ),
    "max_pool2d": (
        ("input", None),
        ("kernel_size", None),
        ("stride", None),
        ("padding", 0),
        ("dilation", 1),
        ("ceil_mode", False),
        ("return_indices", False),
    ),
    "avg_pool2d": (
        ("input", None),
        ("kernel_size", None),
        ("stride", None),
        ("padding", 0),
        ("ceil_mode", False),
        ("count_include_pad", True),
        ("divisor_override", None),
    ),
    "adaptive_avg_pool2d": (("input", None), ("output_size", None)),
    "pad": (("input", None), ("pad", None), ("mode", "constant"), ("value", None)),
}
# Kinds that are ops of lamina: their schema names the arguments.
_OPS = {"int8_linear", "sparse_int8_linear", "lamina_conv2d", "int8_conv2d", "int8_pool2d"}
# Kinds that say nothing about numbers: they never count as work left to eager.
FREE = {"view", "transpose", "getitem", "split", "contiguous", "tensor"}
_VIEWS = {"view", "transpose", "getitem", "split", "contiguous"}
_VIEW_METHODS = {"expand", "unsqueeze", "squeeze", "permute", "chunk", "unbind", "narrow"}
_FREE_METHODS = {"size", "dim", "numel"} | _VIEW_METHODS


# The functions of the operator module that write to their first argument.
_WRITING_OPERATORS = {
    "setitem",
    *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift", "iconcat"),
}


class CaptureError(RuntimeError):
    """A model that Dynamo cannot capture, or that fails when its captured graph is compiled or run."""


def kind(value: Any) -> str | None:
    """What a node computes, in one word; None for placeholders, plain values and what no pass knows."""
    if not isinstance(value, fx.Node):
        return None
    if value.op == "call_function":
        found = _FUNCTIONS.get(value.target)
    elif value.op == "call_method":
        found = _METHODS.get(value.target)
    else:
        return None
    if found == "getitem" and isinstance(value.args[0], fx.Node) and isinstance(fake(value.args[0]), Tensor):
        return None  # indexing a tensor, not taking one of several results
    return found


def operands(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node of a known kind by name, defaults filled in."""
    of_kind = kind(node)
    if of_kind in _OPS:
        return _by_schema(node)
    if of_kind == "softmax" and node.target is not F.softmax:
        parameters = (("input", None), ("dim", None), ("dtype", None))
    else:
        parameters = _PARAMETERS.get(of_kind, (("input", None),))
    values = dict(parameters)
    values.update(zip(values, node.args, strict=False))
    values.update({name: value for name, value in node.kwargs.items() if name in values})
    if of_kind == "pow" and "self" in node.kwargs:
        values["input"] = node.kwargs["self"]
    return values


def _by_schema(node: fx.Node) -> dict[str, Any]:
    arguments = node.target._schema.arguments
    values = {a.name: a.default_value if a.has_default_value() else None for a in arguments}
    values.update(zip(values, node.args, strict=False))
    values.update(node.kwargs)
    return values


def fake(node: fx.Node) -> Any:
    """The value Dynamo or a pass recorded for a node: a FakeTensor, with shape, dtype and strides but no data."""
    return node.meta.get("example_value")


def is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(fake(value), Tensor)


def format_of(node: fx.Node) -> torch.memory_format | None:
    """How a tensor lies in memory: contiguous, channels_last, or None for any other way."""
    value = fake(node)
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    if is_contiguous_or_false(value):
        return torch.contiguous_format
    return torch.channels_last if value.ndim == 4 and is_channels_last_contiguous_or_false(value) else None


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors surely have one shape; a guard is never added to find out."""
    left, right = fake(a).shape, fake(b).shape
    return len(left) == len(right) and all(statically_known_true(x == y) for x, y in zip(left, right, strict=True))


def strip_casts(value: Any, inner: list[fx.Node]) -> Any:
    """The node under dtype casts; the casts are added to `inner`."""
    while kind(value) == "to" and isinstance(value.args[0], fx.Node):
        inner.append(value)
        value = value.args[0]
    return value


def quick_gelu(x: Tensor) -> Tensor:
    """The one activation of the linear kernels that torch has no function for."""
    return x * torch.sigmoid(1.702 * x)


def activation_of(node: fx.Node) -> tuple[str, fx.Node] | None:
    """(name, input) of an elementwise activation that the kernels know."""
    of_kind = kind(node)
    if node.target is quick_gelu:
        return "quick_gelu", node.args[0]
    if of_kind in ("relu", "relu6", "silu", "hardswish", "tanh") and is_tensor(node.args[0] if node.args else None):
        return of_kind, node.args[0]
    if of_kind == "hardtanh" and node.args:
        values = operands(node)
        return ("relu6", node.args[0]) if (values["min_val"], values["max_val"]) == (0, 6) else None
    if of_kind == "gelu" and node.args:
        return {"none": "gelu", "tanh": "gelu_tanh"}[operands(node)["approximate"]], node.args[0]
    return None


def sum_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors of a plain sum that is neither broadcast nor promoted."""
    if kind(node) != "add":
        return None
    values = operands(node)
    a, b = values["input"], values["other"]
    if values["alpha"] != 1 or not (is_tensor(a) and is_tensor(b)) or not (same_shape(a, node) and same_shape(b, node)):
        return None
    return (a, b) if fake(a).dtype == fake(b).dtype == fake(node).dtype else None


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def match(pattern: Any, value: Any, found: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """What the names of a pattern stand for, or None if the value is something else.

    A pattern is a name (any value; twice the same name, twice the same value), a number (to four digits) or a tuple
    (kind, operand patterns): sums and products match in either order. The matched nodes are under "" in the result.

    >>> match(("mul", "x", ("sigmoid", "x")), node)
    """
    found = {"": ()} if found is None else found
    if isinstance(pattern, str):
        if pattern in found:
            return found if found[pattern] is value else None
        return {**found, pattern: value}
    if not isinstance(pattern, tuple):
        plain = number(value)
        return found if plain is not None and math.isclose(plain, pattern, rel_tol=1e-4) else None
    if kind(value) != pattern[0]:
        return None
    values = tuple(operands(value).values())
    if value.kwargs.get("alpha", 1) != 1:
        return None
    found = {**found, "": (*found[""], value)}
    orders = [pattern[1:]]
    if pattern[0] in ("add", "mul"):
        orders.append(pattern[:0:-1])
    for order in orders:
        result: dict[str, Any] | None = found
        for part, operand in zip(order, values, strict=False):
            result = match(part, operand, result)
            if result is None:
                break
        if result is not None:
            return result
    return None


def writes(node: fx.Node) -> bool:
    """Whether a node writes to a tensor, or may: what is not known to be pure torch is taken for a writer."""
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op != "call_function":
        return node.op in ("call_module",)
    target = node.target
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        return True
    inplace = ("dropout", "relu", "silu", "relu6", "hardtanh", "hardswish")
    if kind(node) in inplace and len(node.args) > 1 and node.args[-1] is True:
        return True
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    name = getattr(target, "__name__", "")
    module = getattr(target, "__module__", "") or ""
    if module == "_operator":
        return name in _WRITING_OPERATORS
    if name.endswith("_") and not name.startswith("_"):
        return True
    return not (module.startswith(("torch", "math", "builtins", "lamina")) or type(target).__module__ == "builtins")


@dataclass
class Fold:
    """Tensors made once from parameters and buffers, and again when one of those has changed.

    sources: positions among the graph's inputs; make: their tensors -> the tensors of `outputs`, which are placeholders
    behind the graph's own.
    """

    sources: tuple[int, ...]
    make: Callable[..., tuple[Tensor, ...]]
    outputs: tuple[fx.Node, ...]


@dataclass
class Captured:
    """One graph in the making: its nodes, the real tensors behind its inputs, and what the passes did to it."""

    module: fx.GraphModule
    example_inputs: list[Any]
    measure: bool = True
    # Whether parameters may become views of a merged weight; a compiler further down may have noted where they lie.
    move_parameters: bool = True
    folds: list[Fold] = field(default_factory=list)
    fused: list[tuple[str, str]] = field(default_factory=list)
    left: dict[fx.Node, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A copy: Dynamo goes on reading the graph it gave away.
        self._constants = 0
        # Merged weights are found again while they live: lowering makes all constants once more.
        self._made: list[tuple[Tensor, ...]] = []
        self.graph = fx.Graph()
        self.graph.output(self.graph.graph_copy(self.module.graph, {}))
        self.module = fx.GraphModule(self.module, self.graph)
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.position = {node: i for i, node in enumerate(placeholders)}
        # The mode the graph was traced in; the one of the tracing context is new, for the compiler's own tensors.
        traced = (fake(node) for node in self.graph.nodes)
        self.fake_mode = next((v.fake_mode for v in traced if isinstance(v, FakeTensor)), None) or detect_fake_mode()

        output = next(iter(reversed(self.graph.nodes)))
        self.output_formats: list[torch.memory_format | None] = []
        map_arg(output.args, lambda node: self.output_formats.append(format_of(node)))

    def nodes(self, *kinds: str) -> Iterator[fx.Node]:
        """The nodes of some kinds, in order; a pass may change the graph meanwhile."""
        for node in list(self.graph.nodes):
            if kind(node) in kinds and not node._erased:
                yield node

    def constant(self, node: Any) -> Tensor | None:
        """The real parameter or buffer behind an input of the graph."""
        if not isinstance(node, fx.Node) or node not in self.position:
            return None
        value = self.example_inputs[self.position[node]]
        if not isinstance(value, Tensor) or value.is_inference():  # inference tensors count no versions
            return None
        static = isinstance(value, nn.Parameter) or getattr(value, "_dynamo_static_input_type", None) is not None
        return value if static else None

    def call(
        self, target: Callable | str, args: tuple, kwargs: dict[str, Any] | None = None, *, at: fx.Node
    ) -> fx.Node:
        """A new call in front of `at`, of a function or of a method by its name, with its fake value."""
        create = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        with self.graph.inserting_before(at):
            node = create(target, args, kwargs or {})
        for key in ("nn_module_stack", "stack_trace"):
            if key in at.meta:
                node.meta[key] = at.meta[key]
        self.evaluate(node)
        return node

    def take(self, parts: fx.Node, index: int, *, at: fx.Node) -> fx.Node:
        """One of several results of a call."""
        with self.graph.inserting_before(at):
            node = self.graph.call_function(operator.getitem, (parts, index))
        node.meta["example_value"] = fake(parts)[index]
        return node

    def evaluate(self, node: fx.Node) -> None:
        """Compute a node's fake value from those of its arguments."""
        args, kwargs = map_arg((node.args, dict(node.kwargs)), fake)
        with self.fake_mode, torch.no_grad():
            if node.op == "call_method":
                node.meta["example_value"] = getattr(args[0], node.target)(*args[1:], **kwargs)
            else:
                node.meta["example_value"] = node.target(*args, **kwargs)

    def evaluate_all(self) -> None:
        """The same for all nodes in order; raises what a call that no longer fits its arguments raises."""
        for node in self.graph.nodes:
            if node.op in ("call_function", "call_method"):
                self.evaluate(node)

    def fixed(self, node: Any) -> bool:
        """Whether a node is a parameter, a buffer, or made of such."""
        return self.constant(node) is not None or any(node in fold.outputs for fold in self.folds)

    def known(self, node: Any) -> Tensor | None:
        """The tensor behind a node that is `fixed`, as it is now."""
        for fold, made in zip(self.folds, self._made, strict=True):
            if node in fold.outputs:
                return made[fold.outputs.index(node)]
        return self.constant(node)

    def fold(self, sources: Sequence[fx.Node], make: Callable[..., tuple[Tensor, ...]]) -> tuple[fx.Node, ...]:
        """New inputs of the graph that hold make(*sources), where the sources are `fixed`."""
        inputs, steps = self._trace(sources)

        def composed(*values: Tensor) -> tuple[Tensor, ...]:
            known = dict(zip(inputs, values, strict=True))
            for fold in steps:
                made = fold.make(*(values[inputs.index(i)] for i in fold.sources))
                known.update(zip(fold.outputs, made, strict=True))
            return make(*(known[self.position.get(node, node)] for node in sources))

        with torch.inference_mode(False), torch.no_grad():
            values = composed(*(self.example_inputs[i] for i in inputs))
        self._made.append(values)
        last = next(node for node in self.graph.nodes if node.op != "placeholder")
        outputs = []
        for value in values:
            self._constants += 1
            with self.graph.inserting_before(last):
                node = self.graph.placeholder(f"lamina_constant_{self._constants}")
            node.meta["example_value"] = self.fake_mode.from_tensor(value.detach(), static_shapes=True)
            outputs.append(node)
        self.folds.append(Fold(inputs, composed, tuple(outputs)))
        return tuple(outputs)

    def _trace(self, sources: Sequence[fx.Node]) -> tuple[tuple[int, ...], list[Fold]]:
        """The graph's own inputs behind `sources`, and the folds on the way."""
        steps = [fold for fold in self.folds if any(node in fold.outputs for node in sources)]
        own = [self.position[node] for node in sources if node in self.position]
        return tuple(dict.fromkeys([*own, *(i for fold in steps for i in fold.sources)])), steps

    def drop_unused(self) -> None:
        """Forget folded constants that nothing uses any more."""
        for fold in [f for f in self.folds if not any(node.users for node in f.outputs)]:
            self.folds.remove(fold)
            for node in fold.outputs:
                self.graph.erase_node(node)

    @property
    def writers(self) -> list[fx.Node]:
        """The nodes that write to a tensor, or may."""
        return [node for node in self.graph.nodes if writes(node)]

    def movable(self, nodes: tuple[fx.Node, ...] | list[fx.Node], root: fx.Node) -> bool:
        """Whether `nodes` may run where `root` stands: nothing writes to a tensor in between."""
        if not self.writers:
            return True
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        places = [order[node] for node in (*nodes, root)]
        between = range(min(places), max(places) + 1)
        return not any(
            writes(node) for node, i in order.items() if i in between and node not in nodes and node is not root
        )

    def private(self, nodes: tuple[fx.Node, ...] | list[fx.Node], root: fx.Node) -> bool:
        """Whether nothing but `root` and the nodes themselves uses the nodes."""
        inside = {*nodes, root}
        return all(user in inside for node in inside - {root} for user in node.users)

    def replace(self, root: fx.Node, new: fx.Node, pattern: str) -> None:
        """`new` takes the place of `root`; what only `root` needed goes with it."""
        self.fused.append((pattern, where(root)))
        root.replace_all_uses_with(new)
        self.erase(root)

    def erase(self, node: fx.Node) -> None:
        """Remove a node without users, and then its arguments that have none left."""
        if node._erased or node.users or node.op in ("placeholder", "output"):
            return
        inputs = list(node.all_input_nodes)
        self.graph.erase_node(node)
        for argument in inputs:
            if not argument.users and not writes(argument):
                self.erase(argument)


def where(node: fx.Node) -> str:
    """The module of the model a node comes from: "encoder.layer.0.attention"."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    for old, new in (
        ("L['self']", ""),
        ("L['fn']", ""),
        ("L['call'].__self__", ""),
        ("._modules['", "."),
        ("['", "."),
        ("']", ""),
        ("[", "."),
        ("]", ""),
    ):
        path = path.replace(old, new)
    return path.removeprefix(".")


def is_view(node: Any) -> bool:
    """Whether a node's result has the numbers of its first argument, in the same order of rows or another."""
    if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    return kind(node) in _VIEWS or (node.op == "call_method" and node.target in _VIEW_METHODS)


def is_free(node: fx.Node) -> bool:
    """Whether a node only looks at a tensor or at its sizes."""
    if node.op == "call_method" and node.target in _FREE_METHODS:
        return True
    return kind(node) in FREE or not isinstance(fake(node), Tensor) or node.op not in ("call_function", "call_method")
