"""BERT-large on a GPU: int8 linear layers and lamina's attention against the eager bfloat16 model."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import lamina
from lamina import models
from lamina.bench import gpu
from lamina.bench.modules import caller, count_flops
from lamina.bench.suite.model import MAX_MODEL_ERROR, BERTEncoder
from lamina.bench.workloads import Gate, Workload, relative_error
from lamina.configs import FusedAttention, Int8Dynamic

SIZES = {"dim": 1024, "layers": 24, "heads": 16, "ffn": 4096}
BATCH, TOKENS = 32, 512


@dataclass(frozen=True)
class Inputs:
    """An eager model in eval mode, its rewritten copy and inputs for both."""

    model: torch.nn.Module
    rewritten: torch.nn.Module
    example_inputs: tuple
    flops: int


def workloads() -> Iterator[Workload]:
    """The model as it is and, as another workload since that takes a minute, with both sides compiled by Inductor."""
    yield _workload(compiled=False)
    yield _workload(compiled=True)


def _workload(compiled: bool) -> Workload:
    shape = f"b{BATCH}x{TOKENS}" + ("-compiled" if compiled else "")
    eager = {"eager": lambda inputs: caller(inputs.model, inputs.example_inputs)}
    return Workload(
        id=f"gpu_model/bert_large/{shape}",
        op="gpu_model",
        shape=shape,
        dims={"B": BATCH, "S": TOKENS},
        make_inputs=_make_inputs,
        run=_rewritten_and_compiled if compiled else lambda inputs: caller(inputs.rewritten, inputs.example_inputs),
        baselines=eager | ({"torch.compile": _compiled} if compiled else {}),
        check=_check,
        flops=lambda inputs: inputs.flops,
        bytes=lambda inputs: sum(t.nbytes for t in inputs.rewritten.buffers()),
        precision=lambda inputs: "int8",
        tags=frozenset({"model", "gpu", "bert_large"} | (set() if compiled else {"quick"})),
        device="cuda",
    )


@torch.inference_mode(False)
@torch.no_grad()
def _make_inputs() -> Inputs:
    torch.manual_seed(0)
    with torch.device(gpu.DEVICE):
        model = BERTEncoder(models.create("bert_base", **SIZES)).eval().to(torch.bfloat16)
        ids = torch.randint(0, 30000, (BATCH, TOKENS))
    rewritten = copy.deepcopy(model)
    lamina.swap_(rewritten, (Int8Dynamic(), FusedAttention()))
    return Inputs(model, rewritten, (ids,), count_flops(model, (ids,)))


def _compiled(inputs: Inputs):
    torch._dynamo.reset()
    return caller(torch.compile(copy.deepcopy(inputs.model)), inputs.example_inputs)


def _rewritten_and_compiled(inputs: Inputs):
    torch._dynamo.reset()
    return caller(torch.compile(copy.deepcopy(inputs.rewritten)), inputs.example_inputs)


def _check(inputs: Inputs, output: torch.Tensor) -> Gate:
    truth = caller(inputs.model, inputs.example_inputs)()
    return Gate.judge(relative_error(output, truth), MAX_MODEL_ERROR, "relative output error")
