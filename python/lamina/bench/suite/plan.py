"""Plans of whole models: one call of `lamina.make_plan`'s result against eager PyTorch and the promised peers.

The models are the accelerated ones of suite/model.py; beside each plan the same layers are timed one by one, as "lamina
swapped", which a plan must never be slower than. A model that does not become a plan has no times, but the reason why.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import lamina
from lamina.bench.memory import peak_bytes
from lamina.bench.modules import count_flops
from lamina.bench.peers import PEERS, convert
from lamina.bench.results import LAMINA
from lamina.bench.suite import model as suite
from lamina.bench.workloads import Workload, read_shapes
from lamina.configs import SparseInt8
from lamina.plan.model import Plan

# The peers of the promises, by model and config; always timed.
PROMISED_PEERS = {("lenet", "auto"): "ort", ("bert_base", "auto"): "ort int8"}
PROMISED_PEERS |= {(name, "int8"): "openvino int8" for name in suite.RESNETS}
# Where a promise is made about memory; with smaller models it would be about the process, not about them.
WEIGHED = (("resnet50", 8),)
LARGE = (*suite.TWO_DOORS, *suite.RESNETS)


@dataclass(frozen=True)
class Planned:
    """A float model in eval mode, inputs for it, the model with faster layers, the plan of that, and what it computes.

    flops: of one call, where values that were pruned away do not count; precision: of the fastest layers.
    """

    model: torch.nn.Module
    example_inputs: tuple | dict
    swapped: torch.nn.Module
    plan: Plan
    flops: int
    precision: str


def workloads() -> Iterator[Workload]:
    """Every line of shapes/plan.txt, and the pruned encoder."""
    for name, batch, config in read_shapes("plan", columns=3):

        def make_inputs(name: str = name, batch: int = int(batch), config: str = config) -> Planned:
            return planned(suite.prepare(name, *suite.build(name, batch), config=config))

        yield workload(name, int(batch), make_inputs, config=config)
    yield pruned_bert()


def planned(inputs: suite.Inputs) -> Planned:
    """The plan of an accelerated model. Raises PlanError or CaptureError where there is none."""
    swapped = inputs.accelerated.model
    plan = lamina.make_plan(swapped, inputs.example_inputs)
    precision = "int8" if suite.uses_int8(inputs.accelerated.report) else "float32"
    return Planned(inputs.model, inputs.example_inputs, swapped, plan, inputs.flops, precision)


def workload(
    name: str, batch: int, make_inputs: Callable[[], Planned], *, config: str = "auto", peer: bool = True
) -> Workload:
    """The workload `plan/<name>/b<batch>` on given inputs; `config` as in suite/model.py.

    `peer`: time the peer of the promise too; exporting a large model to one takes long.
    """
    shape = f"b{batch}" if config == "auto" else f"b{batch}-{config}"
    return _workload(name, batch, shape, make_inputs, PROMISED_PEERS.get((name, config)) if peer else None)


def pruned_bert() -> Workload:
    """`plan/bert_base_pruned/...`: the encoder of suite/model.py whose linear layers are pruned, in sparse int8."""

    def make_inputs() -> Planned:
        dense = suite.pruned()
        swapped = suite.rewritten(dense.model, SparseInt8(suite.PATTERN))
        plan = lamina.make_plan(swapped, dense.example_inputs)
        flops = count_flops(dense.model, dense.example_inputs) * (100 - suite.ZEROS) // 100
        return Planned(dense.model, dense.example_inputs, swapped, plan, flops, "int8")

    return _workload("bert_base_pruned", 1, f"b1-{suite.PATTERN}-{suite.ZEROS}", make_inputs, None)


def _workload(name: str, batch: int, shape: str, make_inputs: Callable[[], Planned], peer: str | None) -> Workload:
    promised = {peer: lambda inputs: convert(PEERS[peer], inputs.model, inputs.example_inputs)} if peer else {}
    small = not name.startswith(LARGE)
    return Workload(
        id=f"plan/{name}/{shape}",
        op="plan",
        shape=shape,
        dims={"B": batch},
        make_inputs=make_inputs,
        run=lambda inputs: _call(inputs.plan, inputs.example_inputs),
        baselines={"eager": lambda inputs: _call(inputs.model, inputs.example_inputs)} | promised,
        # Past the graph that accelerate may have compiled: layer by layer.
        variants={"swapped": lambda inputs: _call(inputs.swapped._call_impl, inputs.example_inputs)},
        check=suite.check,
        flops=lambda inputs: inputs.flops,
        bytes=lambda inputs: _weights(inputs.swapped),
        precision=lambda inputs: inputs.precision,
        tags=frozenset({"plan", name} | ({"quick"} if small else set())),
        module=lambda inputs: (inputs.model, inputs.example_inputs),
        memory=_memory if (name, batch) in WEIGHED else None,
    )


def _call(function: Callable, example_inputs: tuple | dict) -> Callable:
    """A call without anything around it, which some plans would take less time than; for inference mode."""
    if isinstance(example_inputs, dict):
        return lambda: function(**example_inputs)
    return lambda: function(*example_inputs)


def _memory(inputs: Planned) -> dict[str, int]:
    """What one call needs: of the plan also the arena, which it keeps between calls."""
    try:
        own, eager = (peak_bytes(_call(f, inputs.example_inputs)) for f in (inputs.plan, inputs.model))
    except OSError:  # a system whose /proc does not tell; the target about it is not judged then
        return {}
    return {LAMINA: own + inputs.plan.arena_bytes, "eager": eager}


def _weights(model: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
