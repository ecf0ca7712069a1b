"""A run of a model, written down: which functions of csrc/ops it called, on which memory.

The graph runs once, for real, under a dispatch mode. What lamina's ops do in Python is to allocate outputs, take views
and call `_C`; the calls of `_C` are recorded as they happen (csrc/bindings/recorder.h), so that a plan needs no second
description of any op. What torch's own ops do is seen by the mode:

- a view is nothing but another way to look at memory that is known;
- what hangs on no input (positions, masks of zeros, packed weights) is computed here and is a constant of the plan;
- an op that `lowering` knows is done by lamina's ops instead, and so recorded;
- any other is a call of torch's op between two segments of the plan.

Nothing is freed while it is recorded, so that an address means one piece of memory.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_map

from lamina import _C
from lamina.compile.capture import where
from lamina.ops.library import CPU_IMPLEMENTATIONS
from lamina.plan.lowering import LOWERINGS, MUTATING, in_place

# Views that torch does not call so.
_VIEWS = {torch.ops.aten._unsafe_view.default, torch.ops.aten._reshape_alias.default, torch.ops.aten.lift_fresh.default}
# What changes how a tensor looks at its memory, and nothing in it: the end of a global average pool of channels_last.
_RESTRIDING = {torch.ops.aten.as_strided_.default}
_BLANK = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
# What hangs on the shape of an input alone, and so on no input of a plan.
_BY_SHAPE = {
    getattr(torch.ops.aten, name).default
    for name in ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
}
# What an op must not be: its result would be another one at each run, or have another shape, or be a plain number.
_DATA_DEPENDENT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Refused(Exception):
    """Why a graph cannot become a plan, in one sentence."""


@dataclass(eq=False)
class Buffer:
    """A piece of memory, one storage of torch's.

    tensor: what it was made as, which keeps it alive; state: "blank" until something is written to it, "constant" if
    that hangs on no input, else "live"; own: whether this run made it; source: which of the inputs it is, if any; made:
    whether a call of torch gave it; initial: what it holds at first, of a constant that is written to later.
    """

    tensor: Tensor
    start: int
    size: int
    state: str
    own: bool = True
    source: int | None = None
    made: bool = False
    initial: Tensor | None = None

    def whole(self) -> Tensor:
        """All its bytes."""
        return torch.empty(0, dtype=torch.uint8).set_(self.tensor.untyped_storage(), 0, (self.size,), (1,))


@dataclass(frozen=True, eq=False)
class Ref:
    """A tensor in a buffer; offset in bytes."""

    buffer: Buffer
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def place(self) -> tuple:
        return self.buffer, self.offset, self.dtype, self.shape, self.strides

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(eq=False)
class Step:
    """A call of a function of csrc/ops. arguments: plain values, lists of them, Ref, or lists of Ref."""

    op: str
    arguments: list[Any]
    module: str

    def refs(self) -> list[Ref]:
        return refs_of(self.arguments)


@dataclass(eq=False)
class TorchCall:
    """A call of one of torch's ops. args, kwargs: Ref in the place of tensors; outputs: Ref, or None for no tensor."""

    op: torch._ops.OpOverload
    args: tuple
    kwargs: dict[str, Any]
    outputs: list[Ref | None]
    module: str

    def refs(self) -> list[Ref]:
        return refs_of((self.args, self.kwargs, self.outputs))


@dataclass
class Recording:
    """What a run called.

    steps: in order; outputs: the tensors among the leaves of the result, None for what is none; plain: what is no
    tensor; structure: how the leaves make the result; inputs: what the graph's inputs lie in, None for plain ones.
    """

    steps: list[Step | TorchCall]
    outputs: list[Ref | None]
    plain: list[Any]
    structure: Any
    inputs: list[Buffer | None]

    @property
    def flat(self) -> bool:
        """Whether the result is a list or tuple of nothing but tensors."""
        return None not in self.outputs and self.structure.num_children == len(self.outputs)


def refs_of(tree: Any) -> list[Ref]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Ref)]


def record(graph: fx.GraphModule, inputs: Sequence[Any], static: Iterable[int]) -> Recording:
    """Runs `graph` on copies of the inputs. static: positions of those that are parameters or buffers of the model.

    Raises Refused if the graph writes to an input or a parameter, or asks for a number that hangs on one; what the
    graph itself raises passes through.
    """
    static = set(static)
    mode = _Recorder()
    given: list[Any] = []
    buffers: list[Buffer | None] = []
    for i, value in enumerate(inputs):
        if not isinstance(value, Tensor):
            given.append(value)
            buffers.append(None)
            continue
        if value.layout is not torch.strided or value.device.type != "cpu" or value.is_conj() or value.is_neg():
            raise Refused(f"an input is {value.layout} on {value.device}, not a plain tensor on the CPU")
        given.append(value if i in static else _own_copy(value))
        buffers.append(mode.add(given[i], "constant" if i in static else "live", own=False, source=i))
    with torch.random.fork_rng(devices=()), mode:
        result = _Run(graph, mode).run(*given)
        mode.take_calls()
    leaves, structure = tree_flatten(result)
    recording = Recording(
        mode.steps,
        [mode.ref(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves],
        [None if isinstance(leaf, Tensor) else leaf for leaf in leaves],
        structure,
        buffers,
    )
    mode.forget_values()
    return recording


def _own_copy(value: Tensor) -> Tensor:
    """The same tensor in memory that no other input shares, with the same strides."""
    reach = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
    return value.as_strided((reach,), (1,)).clone().as_strided(value.shape, value.stride(), 0)


class _Run(fx.Interpreter):
    """Tells the recorder from which module of the model a call comes."""

    def __init__(self, graph: fx.GraphModule, mode: "_Recorder") -> None:
        super().__init__(graph, garbage_collect_values=False)
        self._mode = mode

    def run_node(self, n: fx.Node) -> Any:
        self._mode.take_calls()
        self._mode.module = where(n)
        return super().run_node(n)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step | TorchCall] = []
        self.module = ""
        self._calls = _C.Recorder()
        self._starts: list[int] = []
        self._buffers: list[Buffer] = []
        self._depth = 0
        # Of all tensors without elements, which have no address.
        self._nothing = Buffer(torch.empty(0), 0, 0, "constant")

    def __enter__(self) -> "_Recorder":
        # Entered again by itself, for what an op does inside.
        if self._depth == 0:
            self._calls.open()
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0:
            self._calls.close()

    def add(
        self, tensor: Tensor, state: str, *, own: bool = True, source: int | None = None, made: bool = False
    ) -> Buffer:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return self._nothing
        buffer = Buffer(tensor, storage.data_ptr(), storage.nbytes(), state, own, source, made)
        place = bisect_right(self._starts, buffer.start)
        self._starts.insert(place, buffer.start)
        self._buffers.insert(place, buffer)
        return buffer

    def known(self, tensor: Tensor) -> Buffer | None:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return self._nothing
        place = bisect_right(self._starts, storage.data_ptr()) - 1
        found = place >= 0 and self._starts[place] == storage.data_ptr()
        return self._buffers[place] if found else None

    def buffer(self, tensor: Tensor) -> Buffer:
        """What no op here has made is a constant: a parameter, or a weight packed before."""
        return self.known(tensor) or self.add(tensor, "constant", own=False)

    def ref(self, tensor: Tensor) -> Ref:
        offset = tensor.storage_offset() * tensor.element_size()
        return Ref(self.buffer(tensor), offset, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))

    def _is_live(self, tensor: Tensor) -> bool:
        self.take_calls()
        return self.buffer(tensor).state == "live"

    def forget_values(self) -> None:
        """Frees the memory of what each run computes anew; its form stays."""
        for buffer in self._buffers:
            if buffer.state == "live" and (buffer.own or buffer.source is not None):
                made = buffer.tensor
                buffer.tensor = torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device="meta")

    def take_calls(self) -> None:
        """Turns the calls of `_C` since the last time into steps."""
        for op, arguments in self._calls.drain():
            arguments = tree_map(lambda a: self.ref(a) if isinstance(a, Tensor) else a, arguments)
            refs = refs_of(arguments)
            given = [ref.buffer for ref in refs if ref.buffer.state == "live"]
            if given and op in MUTATING:
                raise Refused(f"{op} writes to memory of the model")
            # What was blank is what the call wrote.
            for ref in refs:
                if ref.buffer.state == "blank":
                    ref.buffer.state = "live" if given else "constant"
            if given:
                self.steps.append(Step(op, arguments, self.module))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self.take_calls()
        if func in CPU_IMPLEMENTATIONS:
            with self:
                return CPU_IMPLEMENTATIONS[func](*args, **kwargs)
        if func in _BLANK:
            out = func(*args, **kwargs)
            self.add(out, "blank")
            return out
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        if func.is_view or func in _VIEWS:
            return func(*args, **kwargs)
        written = self._written(func, args, kwargs)
        if any(not buffer.own for buffer in written):
            raise Refused(f"{func} writes to memory of the model or its caller")
        if func in _RESTRIDING:
            return func(*args, **kwargs)
        live = func not in _BY_SHAPE and any(self.buffer(t).state == "live" for t in tensors)
        if not live and torch.Tag.nondeterministic_seeded not in func.tags:
            return self._constant(func, args, kwargs, written)
        if any(tag in func.tags for tag in _DATA_DEPENDENT):
            raise Refused(f"{func} gives what hangs on the values of its input, not only on its shape")
        result = self._lowered(func, args, kwargs, written)
        return self._torch_call(func, args, kwargs, written) if result is NotImplemented else result

    def _lowered(self, func: Any, args: tuple, kwargs: dict[str, Any], written: list[Buffer]) -> Any:
        if written:
            if func._schema.name[-1] != "_" or len(written) != 1 or self.known(args[0]) is not written[0]:
                return NotImplemented
            self._make_live(written)
            with self:
                result = in_place(self._is_live, func, *args, **kwargs)
        elif func in LOWERINGS:
            with self:
                result = LOWERINGS[func](self._is_live, *args, **kwargs)
        else:
            return NotImplemented
        self.take_calls()
        return result

    def _make_live(self, written: list[Buffer]) -> None:
        for buffer in written:
            if buffer.state == "constant":
                buffer.initial = buffer.tensor.clone()
            buffer.state = "live"

    def _written(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Buffer]:
        if not func._schema.is_mutable:
            return []
        found = []
        for position, argument in enumerate(func._schema.arguments):
            if argument.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                found += [self.buffer(leaf) for leaf in tree_iter(value) if isinstance(leaf, Tensor)]
        return found

    def _constant(self, func: Any, args: tuple, kwargs: dict[str, Any], written: list[Buffer]) -> Any:
        out = func(*args, **kwargs)
        for buffer in written:
            buffer.state = "constant"
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor) and self.known(leaf) is None:
                self.add(leaf, "constant")
        return out

    def _torch_call(self, func: Any, args: tuple, kwargs: dict[str, Any], written: list[Buffer]) -> Any:
        self._make_live(written)
        replaced = tree_map(lambda a: self.ref(a) if isinstance(a, Tensor) else a, (args, kwargs))
        out = func(*args, **kwargs)
        outputs: list[Ref | None] = []
        for leaf in tree_iter(out):
            if not isinstance(leaf, Tensor):
                if leaf is not None:
                    raise Refused(f"{func} gives a plain {type(leaf).__name__}")
                outputs.append(None)
            elif self.known(leaf) is None:
                if leaf.storage_offset():
                    raise Refused(f"{func} gives a part of other memory")
                self.add(leaf, "live", made=True)
                outputs.append(self.ref(leaf))
            else:  # what it wrote to, or a view
                outputs.append(None)
        self.steps.append(TorchCall(func, *replaced, outputs, self.module))
        return out
