"""Plans of whole models, those of lamina.models and of the transformers package: what they give, what stays in torch.

LEFT says which of torch's ops are called between the segments of a model's plan, and how often; of a model that is not
in there none is. It is checked for equality: what gets lost is found, and what is won is written down.
"""

import copy
import inspect
import warnings

import pytest
import test_convolutional_models as convolutional
import torch
from test_models import SMALL
from tolerances import INT8_MODEL_SQNR_DB, assert_composite, assert_exact, assert_lossy, eps, int8_model_sqnr_db
from torch import nn
from torch.utils._pytree import tree_map

import lamina
from lamina import models
from lamina.plan.describe import left
from lamina.plan.structure import named_tensors

transformers = pytest.importorskip("transformers", reason="pip install lamina[models]")

EVERY = {"measure": False}
LAYERS, HEADS, WIDTH, WORDS = 2, 2, 64, 50
COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 128,
}
PATCHES = {"image_size": 16, "patch_size": 8}
PAST = 7
# What the package calls the argument that it called past_key_values before.
CACHE = next(
    name
    for name in inspect.signature(transformers.GPT2LMHeadModel.forward).parameters
    if "cache" in name or "past" in name
)


@pytest.fixture(autouse=True)
def no_graphs_left():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def one_thread():
    """These layers are too small to share out; on a busy machine the threads would only wait for each other."""
    torch.set_num_threads(1)


# -- models


def of(model: str, config: str, **options):
    return lambda **more: getattr(transformers, model)(getattr(transformers, config)(**options, **more))


def gpt2(**options):
    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "vocab_size": WORDS}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends, **options))


def clip():
    text = COMMON | {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": WORDS - 1, "pad_token_id": 0}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=COMMON | PATCHES, projection_dim=32)
    )


def wav2vec2(**options):
    sizes = {"conv_dim": (24,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**COMMON, **sizes, **options))


def tokens(batch: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, WORDS, (batch, length))
    mask = torch.ones_like(ids)
    mask[-1, length * 2 // 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def texts_and_images() -> dict[str, torch.Tensor]:
    return {**tokens(), "pixel_values": torch.randn(3, 3, 16, 16)}


def both_tokens() -> dict[str, torch.Tensor]:
    given = tokens()
    return {**given, "decoder_input_ids": given["input_ids"].clone()}


def sounds() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, 1600)}


def masked_sounds() -> dict[str, torch.Tensor]:
    return sounds() | {"attention_mask": (torch.arange(1600) < torch.tensor([[1600], [900]])).long()}


def cache(batch: int = 2):
    def states():
        return torch.randn(batch, HEADS, PAST, WIDTH // HEADS)

    return transformers.DynamicCache([(states(), states()) for _ in range(LAYERS)])


def next_token() -> dict:
    return {"input_ids": torch.randint(1, WORDS, (2, 1)), CACHE: cache()}


def own(name: str):
    options = SMALL.get(name, {})
    return lambda: models.create(name, **options), lambda: models.example_inputs(name, 2, **options)


BERT = {**COMMON, "vocab_size": WORDS}
DISTILBERT = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 128, "vocab_size": WORDS}
LLAMA = {**COMMON, "vocab_size": WORDS, "num_key_value_heads": 1}
T5 = {"d_model": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "d_ff": 128, "d_kv": 32, "vocab_size": WORDS}
# How to build a model, and its inputs. The networks of images are those of test_convolutional_models.py.
MODELS = {
    **{name: own(name) for name in ("mlp", "lstm", "gru", "seq2seq", "seq2seq_dates")},
    **{name: own(name) for name in ("bert_tiny", "bert_base", "gpt_tiny", "gpt2", "vit_mnist", "vit_base")},
    "bert_hf": (of("BertForSequenceClassification", "BertConfig", **BERT), tokens),
    "bert_hf_spelled_out": (of("BertModel", "BertConfig", **BERT, attn_implementation="eager"), tokens),
    "distilbert": (of("DistilBertForSequenceClassification", "DistilBertConfig", **DISTILBERT), tokens),
    "gpt2_prefill": (gpt2, tokens),
    "gpt2_decode": (gpt2, next_token),
    "llama": (of("LlamaForCausalLM", "LlamaConfig", **LLAMA), tokens),
    "t5": (of("T5Model", "T5Config", **T5, use_cache=False), both_tokens),
    "vit_hf": (
        of("ViTForImageClassification", "ViTConfig", **COMMON, **PATCHES),
        lambda: {"pixel_values": torch.randn(2, 3, 16, 16)},
    ),
    "clip": (clip, texts_and_images),
    "wav2vec2_model": (wav2vec2, sounds),
    "wav2vec2_masked": (lambda: wav2vec2(feat_extract_norm="layer", do_stable_layer_norm=True), masked_sounds),
}
LEFT = {
    # The weights of additive attention times what they weigh.
    "seq2seq": {"aten.bmm": 1},
    "seq2seq_dates": {"aten.bmm": 1},
    # Where the text ends, and every text times every image.
    "clip": {"aten.argmax": 1, "aten.index.Tensor": 1, "aten.mm": 1},
    # Lengths of sounds as integers, and what is set to True at their ends.
    "wav2vec2_masked": {
        **{"aten.cumsum": 2, "aten.sub.Tensor": 8, "aten.div.Tensor_mode": 7, "aten.add.Tensor": 7},
        **{"aten.index_put_": 2, "aten.flip": 2, "aten.repeat": 1},
    },
    "segformer": {"aten.upsample_bilinear2d": 2},
}


def make(name: str) -> tuple[nn.Module, dict | tuple]:
    if name in convolutional.MODELS:
        model, x = convolutional.make(name)
        return model, (x,)
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    return build().eval(), inputs()


def quantize(model: nn.Module, precision: str, inputs: dict | tuple) -> None:
    if any(isinstance(module, nn.LSTM | nn.GRU) for module in model.modules()):
        lamina.swap_(model, lamina.FusedRNN())
    if precision == "int8":
        lamina.swap_(model, lamina.Int8Dynamic())
    elif precision == "static":
        lamina.swap_(model, lamina.Int8Static([inputs]))


def call(model, inputs: dict | tuple):
    """All tensors of the result, by name."""
    inputs = copy.deepcopy(inputs)
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return named_tensors(result if isinstance(result, dict) else {"output": result})


def as64(inputs):
    def double(value):
        if isinstance(value, transformers.DynamicCache):
            return transformers.DynamicCache([(key.double(), state.double()) for key, state, *_ in value])
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tree_map(double, inputs)


def bound_of(name: str, model: nn.Module, precision: str) -> float:
    """The ratio of signal to noise that convolutions, and layers in int8, have to keep."""
    if precision == "float32":
        return convolutional.FLOAT_SQNR_DB
    layers = len(convolutional.layers_of(model)) if name in convolutional.MODELS else 0
    return min(INT8_MODEL_SQNR_DB, int8_model_sqnr_db(layers))


EVERY_CASE = [
    *((name, precision) for name in MODELS for precision in ("float32", "int8")),
    *((name, precision) for name in convolutional.MODELS for precision in ("float32", "int8", "static")),
]


@pytest.mark.parametrize(("name", "precision"), EVERY_CASE, ids=["-".join(case) for case in EVERY_CASE])
def test_plan_of(name, precision, tmp_path):
    """The model's outputs, nothing in torch but what is known, and the same bits from a file."""
    model, inputs = make(name)
    eager = call(model, inputs)
    truth = None
    if precision == "float32" and name not in convolutional.MODELS:
        truth = call(copy.deepcopy(model).double(), as64(inputs))
    bound = bound_of(name, model, precision)
    quantize(model, precision, inputs)
    given = copy.deepcopy(inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="lamina")
        plan = lamina.make_plan(model, given, options=EVERY)
    assert_exact(list(named_tensors({"": given}).values()), list(named_tensors({"": inputs}).values()))

    result = call(plan, inputs)
    assert result.keys() == eager.keys()
    for part, expected in eager.items():
        if not expected.is_floating_point():
            assert_exact(result[part], expected, part)
        elif truth is not None:
            # How exact the worst of a few numbers is in eager is luck (a head of four): some roundings more are fair.
            floor = 16 * eps(expected.dtype) * truth[part].abs().max().item()
            assert_composite(result[part], expected, truth[part], floor=floor, what=part)
        else:
            assert_lossy(result[part], expected, min_sqnr_db=bound, what=part)
    assert left(plan.program.recording) == LEFT.get(name, {})

    plan.save(tmp_path / "plan.safetensors")
    loaded = call(lamina.load_plan(tmp_path / "plan.safetensors"), inputs)
    assert loaded.keys() == result.keys()
    assert_exact([loaded[part] for part in result], list(result.values()))


def test_a_detector_says_why_it_has_no_plan():
    """How many boxes are kept hangs on what is in the image."""
    model, x = convolutional.make("detector")
    with pytest.raises(lamina.PlanError, match=r"Detector is not one graph: .* branches on data") as refusal:
        lamina.make_plan(model, (x,), options=EVERY)
    assert "\n" not in str(refusal.value)


# -- caches of keys and values


def test_a_cache_goes_in_as_an_object_or_as_tuples_and_comes_out_as_tuples():
    torch.manual_seed(0)
    model, inputs = gpt2().eval(), next_token()
    plan = lamina.make_plan(model, inputs, options=EVERY)
    names = [i.name for i in plan.inputs]
    assert names == ["input_ids", *(f"{CACHE}.{layer}.{i}" for layer in range(LAYERS) for i in range(2))]
    past = inputs[CACHE]
    assert past.get_seq_length() == PAST

    tuples = tuple((keys, values) for keys, values, *_ in past)
    first, second = plan(**inputs), plan(inputs["input_ids"], **{CACHE: tuples})
    assert past.get_seq_length() == PAST  # what is given stays as it is
    expected = call(model, inputs)
    for result in (first, second):
        assert_exact(result["logits"], first["logits"])
        for layer, (keys, values, *_) in enumerate(result[CACHE]):
            assert keys.shape == values.shape == (2, HEADS, PAST + 1, WIDTH // HEADS)
            torch.testing.assert_close(keys, expected[f"{CACHE}.{layer}.0"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(values, expected[f"{CACHE}.{layer}.1"], rtol=1e-4, atol=1e-5)


def test_words_one_by_one_from_one_plan(tmp_path):
    """A window of the last words, the oldest dropped at each step: one plan serves them all, and gives what the model
    gives for a cache that grows. Places that hold no word yet are masked."""
    torch.manual_seed(0)
    model = gpt2().eval()
    ids = torch.randint(1, WORDS, (2, 3))
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)

    nothing = transformers.DynamicCache([[torch.zeros(2, HEADS, PAST, WIDTH // HEADS)] * 2 for _ in range(LAYERS)])
    window = {"attention_mask": torch.zeros(2, PAST + 1, dtype=torch.long), CACHE: nothing}
    example = {"input_ids": ids[:, :1], "position_ids": torch.zeros(2, 1, dtype=torch.long), **window}
    lamina.make_plan(model, example, options=EVERY).save(tmp_path / "step.safetensors")
    step = lamina.load_plan(tmp_path / "step.safetensors")

    past, words = tuple((keys, values) for keys, values, *_ in nothing), ids
    for place in range(expected.shape[1] - 1):
        mask = (torch.arange(PAST + 1) >= PAST - place).long().expand(2, -1)
        position = torch.full((2, 1), place)
        result = step(words[:, place : place + 1], **{CACHE: past}, attention_mask=mask, position_ids=position)
        past = tuple((keys[:, :, 1:], values[:, :, 1:]) for keys, values, *_ in result[CACHE])
        if place + 1 == words.shape[1]:
            words = torch.cat([words, result["logits"][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(words, expected)


def test_a_cache_that_is_written_to_in_place_is_refused():
    torch.manual_seed(0)
    model = gpt2().eval()
    static = transformers.StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(lamina.PlanError, match=r"plan: GPT2LMHeadModel") as refusal:
        lamina.make_plan(model, {"input_ids": torch.randint(1, WORDS, (2, 3)), CACHE: static}, options=EVERY)
    assert "\n" not in str(refusal.value)
