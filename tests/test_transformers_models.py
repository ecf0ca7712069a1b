"""Whole models of the transformers package, random weights, through swap_ and accelerate: taken as they are defined.

Sizes of heads and the number of layers are real, widths are small. Nothing in lamina knows these models by name.
"""

import copy
import sys

import pytest
import torch
from tolerances import INT8_MODEL_SQNR_DB, assert_exact, assert_lossy, int8_model_sqnr_db
from torch import nn

import lamina
from lamina.nn import Int8Linear
from lamina.running import floats

transformers = pytest.importorskip("transformers", reason="pip install lamina[models]")

INT8, ATTENTION = lamina.Int8Dynamic(), lamina.FusedAttention()

# Float attention differs from torch's by the order of its sums.
FLOAT_SQNR_DB = 100.0

ENCODER = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
TEXT = {**ENCODER, "vocab_size": 300}
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SEQ2SEQ = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0}


@pytest.fixture(autouse=True)
def one_thread():
    """These layers are too small to share out; on a busy machine the threads would only wait for each other."""
    torch.set_num_threads(1)


def of(model: str, config: str, **options):
    return getattr(transformers, model)(getattr(transformers, config)(**options))


def clip():
    text = transformers.CLIPTextConfig(**TEXT, max_position_embeddings=32, **{**SPECIAL, "eos_token_id": 2})
    vision = transformers.CLIPVisionConfig(**ENCODER, image_size=64, patch_size=16)
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    )


MODELS = {
    "bert": lambda: of("BertForSequenceClassification", "BertConfig", **TEXT),
    "roberta": lambda: of("RobertaForMaskedLM", "RobertaConfig", **TEXT),
    "distilbert": lambda: of(
        "DistilBertForTokenClassification",
        "DistilBertConfig",
        **{"dim": 128, "n_layers": 2, "n_heads": 2, "hidden_dim": 256, "vocab_size": 300},
    ),
    "gpt2": lambda: of(
        "GPT2LMHeadModel", "GPT2Config", n_embd=128, n_layer=2, n_head=2, vocab_size=300, n_positions=64, **SPECIAL
    ),
    "opt": lambda: of(
        "OPTForCausalLM",
        "OPTConfig",
        **{"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 256, "vocab_size": 300},
        **{"word_embed_proj_dim": 128, "max_position_embeddings": 64, **SPECIAL},
    ),
    "llama": lambda: of(
        "LlamaForCausalLM",
        "LlamaConfig",
        **{**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, **SPECIAL},
    ),
    "t5": lambda: of(
        "T5ForConditionalGeneration",
        "T5Config",
        **{"d_model": 128, "d_kv": 64, "d_ff": 256, "num_layers": 2, "num_heads": 2, **SEQ2SEQ},
    ),
    "bart": lambda: of(
        "BartForConditionalGeneration",
        "BartConfig",
        **{"d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64, **SEQ2SEQ},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256},
    ),
    "vit": lambda: of("ViTForImageClassification", "ViTConfig", **ENCODER, image_size=64, patch_size=16, num_labels=8),
    "clip": clip,
    "wav2vec2": lambda: of(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        **{**TEXT, "vocab_size": 40, "conv_dim": (32,) * 7},
        **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    ),
}
SEQ2SEQ_MODELS = ("t5", "bart")
DECODERS = ("gpt2", "opt", "llama", *SEQ2SEQ_MODELS)
TIED = {"roberta", "gpt2", "opt", "t5", "bart"}


def make(name: str):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def inputs_of(name: str, batch: int = 3, length: int = 17) -> dict[str, torch.Tensor]:
    """A batch whose second row is padded, where the model takes a mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:2, length - 5 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name in SEQ2SEQ_MODELS:
        inputs["decoder_input_ids"] = ids[:, :7].flip(0)
    if name in ("vit", "clip"):
        images = torch.randn(batch, 3, 64, 64, generator=generator)
        inputs = {"pixel_values": images, **(inputs if name == "clip" else {})}
    if name == "wav2vec2":
        inputs = {"input_values": torch.randn(batch, 320 * length, generator=generator)}
    return inputs


def outputs(model: nn.Module, inputs: dict) -> list[torch.Tensor]:
    """All floating-point outputs, caches included; of hidden padding nothing is expected."""
    with torch.no_grad():
        found = model(**inputs)
    if "attention_mask" in inputs and "logits" in found and found["logits"].shape[:2] == inputs["attention_mask"].shape:
        return [found["logits"][inputs["attention_mask"].bool()]]
    # CLIP's logits are cosines of two directions, near zero for random weights; both directions are outputs as well.
    return floats({key: value for key, value in found.items() if not key.startswith("logits_per_")})


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor], min_sqnr_db: float) -> None:
    assert len(actual) == len(expected) > 0
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_lossy(a, e, min_sqnr_db=min_sqnr_db, what=f"output {number}")


LINEARS = (nn.Linear, transformers.pytorch_utils.Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def layers_of(model: nn.Module, types: tuple[type[nn.Module], ...] = (*LINEARS, *CONVOLUTIONS)) -> set[str]:
    return {fqn for fqn, module in model.named_modules() if type(module) in types}


@pytest.mark.parametrize("config", [INT8, lamina.Int8WeightOnly()], ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("name", MODELS)
def test_swap_int8(name, config):
    model, inputs = make(name), inputs_of(name)
    types = LINEARS if isinstance(config, lamina.Int8WeightOnly) else (*LINEARS, *CONVOLUTIONS)
    expected, layers = outputs(model, inputs), layers_of(model, types)
    report = lamina.swap_(model, config)
    assert {d.fqn for d in report.swapped} == layers
    assert all("its weight is parametrized" in d.reason for d in report.left)
    assert layers_of(model, types) == set()
    assert_close(outputs(model, inputs), expected, int8_model_sqnr_db(len(layers)))


@pytest.mark.parametrize("name", MODELS)
def test_swap_int8_static(name):
    """One scale for all rows of a layer's input, found on these inputs."""
    model, inputs = make(name), inputs_of(name)
    expected, layers = outputs(model, inputs), layers_of(model)
    report = lamina.swap_(model, lamina.Int8Static([inputs]))
    assert {d.fqn for d in report.swapped} == layers
    assert all("its weight is parametrized" in d.reason for d in report.left)
    assert_close(outputs(model, inputs), expected, int8_model_sqnr_db(len(layers)))


@pytest.mark.parametrize("name", MODELS)
def test_swap_attention(name):
    model, inputs = make(name), inputs_of(name)
    expected = outputs(model, inputs)
    (decision,) = lamina.swap_(model, ATTENTION).decisions
    assert decision.now == "attention 'lamina'"
    assert_close(outputs(model, inputs), expected, FLOAT_SQNR_DB)


@pytest.fixture
def always_faster(monkeypatch):
    """Speed is not judged here."""

    def interleaved(before, after, seconds, stopwatch):
        before(), after()
        return 2.0, 1.0

    monkeypatch.setattr(sys.modules["lamina.accelerate"], "_interleaved", interleaved)


@pytest.mark.filterwarnings("ignore:.*Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", MODELS)
def test_accelerate(name, always_faster, tmp_path):
    """Layers and graph together agree with the model, on other sizes too, and the layers come back from a file."""
    torch._dynamo.reset()
    model, inputs, others = make(name), inputs_of(name), inputs_of(name, 2, 23)
    fast = lamina.accelerate(model, inputs, max_error=0.1)
    assert {d.fqn for d in fast.report.swapped} == {"", *layers_of(model)}
    assert fast.report.form == "swapped layers, compiled", fast.report.forms
    bound = int8_model_sqnr_db(len(layers_of(model)))
    assert_close(outputs(fast.model, inputs), outputs(model, inputs), bound)
    assert_close(outputs(fast.model, others), outputs(model, others), bound)

    if name in DECODERS:  # its steps have sizes of their own and a cache, and run layer by layer
        options = {"max_new_tokens": 4, "do_sample": False}
        layers = copy.deepcopy(fast.model)
        assert torch.equal(
            fast.model.generate(inputs["input_ids"], **options), layers.generate(inputs["input_ids"], **options)
        )

    lamina.save(fast.model, tmp_path / "model.safetensors")
    fresh = make(name)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(0.5)
    lamina.load_(fresh, tmp_path / "model.safetensors")
    lamina.swap_(fresh, ATTENTION)
    for actual, expected in zip(outputs(fresh, inputs), outputs(copy.deepcopy(fast.model), inputs), strict=True):
        assert_exact(actual, expected)


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_stay_the_same(name):
    """Through the caches of self and cross attention, from a padded batch, in float."""
    model, inputs = make(name), inputs_of(name)
    inputs.pop("decoder_input_ids", None)
    if name not in SEQ2SEQ_MODELS:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)  # a decoder goes on from the last token
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **options)
    lamina.swap_(model, ATTENTION)
    assert torch.equal(model.generate(**inputs, **options), expected)
    lamina.swap_(model, INT8)
    assert model.generate(**inputs, **options).shape == expected.shape


@pytest.mark.parametrize("name", sorted(TIED))
def test_tied_heads(name):
    """The head becomes int8, the embedding keeps its floats; the report says what that costs."""
    model, inputs = make(name), inputs_of(name)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight
    before = embedding.weight.detach().clone()
    report = lamina.swap_(model, INT8)
    head = model.get_output_embeddings()
    assert isinstance(head, Int8Linear)
    assert_exact(embedding.weight.detach(), before)
    (decision,) = (d for d in report.decisions if "keep" in d.reason)
    grown = sum(buffer.nbytes for buffer in head.buffers()) / 1e6
    assert decision.reason.endswith(f"the weight it shared, so that memory grows by {grown:.1f} MB")

    state = copy.deepcopy(model.state_dict())
    other = make(name)
    lamina.swap_(other, INT8)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    other.load_state_dict(state)
    for actual, expected in zip(outputs(other, inputs), outputs(model, inputs), strict=True):
        assert_exact(actual, expected)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_bfloat16_models(name):
    model = make(name).bfloat16()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs_of(name).items()}
    expected = outputs(copy.deepcopy(model).float(), inputs_of(name))
    lamina.swap_(model, [INT8, ATTENTION])
    actual = outputs(model, inputs)
    assert actual[0].dtype == torch.bfloat16
    # Rounding to 8 bits of mantissa after every layer is noise of the size of int8's: 3 dB on top of it.
    assert_close(actual, expected, INT8_MODEL_SQNR_DB - 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_other_dtypes_are_left_to_torch(name, dtype):
    model, inputs = make(name).to(dtype), inputs_of(name)
    expected = outputs(model, inputs)
    report = lamina.swap_(model, INT8)
    assert report.swapped == ()
    assert {d.reason for d in report.left} == {f"the weight is {dtype}, and int8 kernels take float32 and bfloat16"}
    for actual, value in zip(outputs(model, inputs), expected, strict=True):
        assert_exact(actual, value)
    lamina.swap_(model, ATTENTION)  # its calls go to torch's op
    assert_close(outputs(model, inputs), expected, 50 if dtype == torch.float16 else 200)
