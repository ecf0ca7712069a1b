"""Models as the transformers package and lamina.models define them: one graph, the fusions that their layers have, and
the outputs of the model as it was."""

import copy

import pytest
import torch
from tolerances import INT8_MODEL_SQNR_DB, assert_composite, assert_lossy

import lamina
from lamina import models
from lamina.compile import compile_, explain

transformers = pytest.importorskip("transformers", reason="pip install lamina[models]")

EVERY = {"measure": False}
LAYERS = 2
COMMON = {"hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 128}


def bert(**config):
    return transformers.BertModel(transformers.BertConfig(**COMMON, vocab_size=50, **config))


def gpt2(**config):
    sizes = {"n_embd": 64, "n_layer": LAYERS, "n_head": 2, "n_positions": 64}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2Model(transformers.GPT2Config(**sizes, **ends, vocab_size=50, use_cache=False, **config))


def llama(**config):
    return transformers.LlamaModel(
        transformers.LlamaConfig(**COMMON, vocab_size=50, num_key_value_heads=1, use_cache=False, **config)
    )


def t5(**config):
    sizes = {"d_model": 64, "num_layers": LAYERS, "num_heads": 2, "d_ff": 128, "d_kv": 32}
    return transformers.T5Model(transformers.T5Config(**sizes, vocab_size=50, use_cache=False, **config))


def vit(**config):
    return transformers.ViTModel(transformers.ViTConfig(**COMMON, image_size=16, patch_size=8, **config))


def tokens(batch: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (batch, length))
    mask = torch.ones_like(ids)
    mask[-1, length * 2 // 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def both_tokens() -> dict[str, torch.Tensor]:
    given = tokens()
    return {**given, "decoder_input_ids": given["input_ids"]}


MODELS = {
    "bert": (bert, tokens),
    "gpt2": (gpt2, tokens),
    "llama": (llama, tokens),
    "t5": (t5, both_tokens),
    "vit": (vit, lambda: {"pixel_values": torch.randn(2, 3, 16, 16)}),
}
# Fusions in the float model, with attention called or spelled out.
PACKED = "on a packed copy of its weight"
FLOAT = {
    "bert": {"3 linear of one input": LAYERS, f"linear + residual {PACKED}": 2 * LAYERS},
    "gpt2": {"gelu_tanh spelled out": LAYERS, f"linear + residual {PACKED}": 2 * LAYERS},
    "llama": {
        "3 linear of one input": LAYERS,
        "2 linear of one input": LAYERS,
        "rms_norm spelled out": 2 * LAYERS + 1,
        f"linear + residual {PACKED}": 2 * LAYERS,
    },
    "t5": {"3 linear of one input": 2 * LAYERS, "rms_norm spelled out": 5 * LAYERS + 2},
    "vit": {"3 linear of one input": LAYERS, f"linear + residual {PACKED}": 2 * LAYERS},
}
# And in the model whose linear layers were swapped for int8.
INT8 = {
    "bert": {"3 int8_linear of one input": LAYERS, "linear + gelu": LAYERS, "linear + residual": 2 * LAYERS},
    "llama": {
        "3 int8_linear of one input": LAYERS,
        "rows quantized once for 2 layers": LAYERS,
        "linear + silu": LAYERS,
        "linear + residual": 2 * LAYERS,
    },
    "t5": {"3 int8_linear of one input": 2 * LAYERS, "linear + relu": 2 * LAYERS, "linear + residual": 5 * LAYERS},
    "vit": {"3 int8_linear of one input": LAYERS, "linear + gelu": LAYERS, "linear + residual": 2 * LAYERS},
}
ATTENTIONS = dict.fromkeys(MODELS, LAYERS) | {"t5": 3 * LAYERS}


def make(name: str, **config):
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    return build(**config).eval(), inputs()


def output_of(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def as64(inputs):
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_float_model(name, attention):
    model, inputs = make(name, attn_implementation=attention)
    eager, truth = output_of(model, inputs), output_of(copy.deepcopy(model).double(), as64(inputs))
    report = compile_(model, inputs, options=EVERY)
    assert_composite(output_of(model, inputs), eager, truth)
    assert len(report.graphs) == 1
    pattern = "attention" if attention == "sdpa" else "attention spelled out"
    for wanted, count in (FLOAT[name] | {pattern: ATTENTIONS[name]}).items():
        assert report.fused[wanted] == count, f"{wanted}: {report.fused[wanted]}\n{report}"


@pytest.mark.parametrize("name", INT8)
def test_int8_model(name):
    model, inputs = make(name)
    eager = output_of(model, inputs)
    lamina.swap_(model, lamina.Int8Dynamic())
    report = compile_(model, inputs, options=EVERY)
    assert_lossy(output_of(model, inputs), eager, min_sqnr_db=INT8_MODEL_SQNR_DB)
    for wanted, count in (INT8[name] | {"attention": ATTENTIONS[name]}).items():
        assert report.fused[wanted] == count, f"{wanted}: {report.fused[wanted]}\n{report}"


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_int8_while_compiling(name):
    model, inputs = make(name)
    eager = output_of(model, inputs)
    report = compile_(model, inputs, options=EVERY | {"config": lamina.Int8Dynamic()})
    assert_lossy(output_of(model, inputs), eager, min_sqnr_db=INT8_MODEL_SQNR_DB)
    assert report.fused["linear to int8"] >= 4 * LAYERS
    assert report.fused["linear + residual"] == 2 * LAYERS


def test_other_lengths_and_batches():
    model, inputs = make("bert")
    eager = copy.deepcopy(model)
    compile_(model, inputs, options=EVERY)
    for batch, length in ((3, 12), (3, 17), (1, 5)):
        inputs = tokens(batch, length)
        torch.testing.assert_close(output_of(model, inputs), output_of(eager, inputs), rtol=1e-4, atol=1e-5)


def test_generation():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**COMMON, vocab_size=50, num_key_value_heads=1, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 50, (2, 5))
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    compile_(model, {"input_ids": ids}, options=EVERY)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_reference_bert_leaves_only_its_embeddings_to_eager():
    model = models.create("bert_tiny").eval()
    lamina.swap_(model, lamina.Int8Dynamic())
    report = explain(model, models.example_inputs("bert_tiny", 2), options=EVERY)
    left = {operation for graph in report.graphs for operation, _, _ in graph.eager}
    assert left <= {"arange", "zeros_like", "embedding", "add", "bool", "getitem"}, left
