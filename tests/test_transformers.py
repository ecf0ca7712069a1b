"""attn_implementation="lamina" on models of transformers, built here from tiny random configs: no network.

The yardstick is transformers' own sdpa path; the truth is the same model in float64.
"""

import copy
import sys

import pytest
import torch
from tolerances import EXP2_ERROR, INT8_MODEL_SQNR_DB, assert_composite, assert_exact, assert_lossy

import lamina
from lamina.integrations.transformers import attention_forward, register

transformers = pytest.importorskip("transformers", reason="pip install lamina[models]")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 60}

MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=60)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=64, eos_token_id=None)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=2, eos_token_id=None)
    ),
    "llama_one_kv_head": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=1, eos_token_id=None)
    ),
    "mistral_window": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=5, eos_token_id=None)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16, eos_token_id=None)
    ),
}
# Models that transformers computes eagerly only; their weights are large enough for caps and sinks to matter.
EAGER = {
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **SMALL, num_key_value_heads=2, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0, eos_token_id=None
        )
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **SMALL,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=5,
            num_local_experts=2,
            num_experts_per_tok=1,
            eos_token_id=None,
        )
    ),
}
DECODERS = [name for name in MODELS if name not in ("bert", "distilbert")]


def make(name: str, attention: str, dtype: torch.dtype = torch.float32):
    register()
    torch.manual_seed(0)
    model = MODELS[name]().eval().to(dtype)
    model.set_attn_implementation(attention)
    return model


def output_of(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def tokens(batch: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(1, 60, (batch, length), generator=torch.Generator().manual_seed(1))


def padded(side: str, batch: int = 3, length: int = 12) -> dict:
    """The last rows of a batch are shorter; `side` says where they are filled up."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        hidden = slice(length - 3 * row, None) if side == "right" else slice(0, 3 * row)
        mask[row, hidden] = 0
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


def compare(name: str, **inputs) -> None:
    lamina_out, sdpa_out = (output_of(make(name, kind), **inputs) for kind in ("lamina", "sdpa"))
    truth = output_of(make(name, "sdpa", torch.float64), **inputs)
    keep = inputs.get(
        "attention_mask", torch.ones_like(inputs["input_ids"])
    ).bool()  # padding's own output means nothing
    floor = (torch.finfo(torch.float32).eps + EXP2_ERROR) * truth.abs().max().item()
    assert_composite(lamina_out[keep], sdpa_out[keep], truth[keep], floor=floor, what=name)


def test_register_is_harmless_when_repeated():
    register()
    register()
    interface = transformers.AttentionInterface()
    assert interface["lamina"] is attention_forward
    assert transformers.AttentionMaskInterface()["lamina"] is transformers.AttentionMaskInterface()["sdpa"]


def test_register_without_transformers(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"transformers is not installed; pip install 'lamina\[models\]'"):
        register()


@pytest.mark.parametrize("name", MODELS)
def test_lamina_really_runs(name, monkeypatch):
    """Else every comparison below would compare sdpa with itself."""
    calls = []
    real = lamina.integrations.transformers.drop_in_attention

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return real(*args, **kwargs)

    monkeypatch.setattr("lamina.integrations.transformers.drop_in_attention", counted)
    output_of(make(name, "lamina"), input_ids=tokens())
    assert len(calls) == 2
    assert not [shape for shape in calls if len(shape) != 4]
    output_of(make(name, "sdpa"), input_ids=tokens())
    assert len(calls) == 2


@pytest.mark.parametrize("name", MODELS)
def test_same_as_sdpa(name):
    compare(name, input_ids=tokens())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_same_as_sdpa_with_padding(name, side):
    compare(name, **padded(side))


@pytest.mark.parametrize("name", MODELS)
def test_one_token(name):
    compare(name, input_ids=tokens(2, 1))


@pytest.mark.parametrize("name", MODELS)
def test_padding_does_not_change_the_tokens(name):
    """The same sentence alone and in a padded batch."""
    inputs = padded("right")
    model = make(name, "lamina")
    together = output_of(model, **inputs)
    for row in range(3):
        length = int(inputs["attention_mask"][row].sum())
        alone = output_of(model, input_ids=inputs["input_ids"][row : row + 1, :length])
        assert_lossy(together[row : row + 1, :length], alone, min_sqnr_db=100, what=f"row {row}")


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_do_not_see_the_future(name):
    ids = tokens(1, 10)
    model = make(name, "lamina")
    before = output_of(model, input_ids=ids)
    ids[0, 7:] = 3
    after = output_of(model, input_ids=ids)
    assert_exact(after[:, :7], before[:, :7])
    assert not torch.equal(after[:, 7:], before[:, 7:])


def test_encoders_see_everything():
    ids = tokens(1, 10)
    model = make("bert", "lamina")
    before = output_of(model, input_ids=ids)
    ids[0, 9] = (ids[0, 9] + 1) % 60
    assert not torch.equal(output_of(model, input_ids=ids)[:, 0], before[:, 0])


@pytest.mark.parametrize("name", DECODERS)
def test_generate_with_cache(name):
    """Greedy search: the same tokens, step by step through the cache."""
    prompt = tokens(2, 5)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = make(name, "sdpa").generate(prompt, **options)
    assert torch.equal(make(name, "lamina").generate(prompt, **options), expected)
    assert expected.shape == (2, 17)


@pytest.mark.parametrize("name", DECODERS)
def test_generate_with_a_static_cache(name):
    """The cache has room for more tokens than there are; what is in the rest of it does not count."""
    prompt = tokens(2, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = make(name, "sdpa").generate(prompt, **options)
    model = make(name, "lamina")
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    actual = model.generate(prompt, past_key_values=cache, disable_compile=True, **options)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", DECODERS)
def test_generate_from_a_padded_batch(name):
    inputs = padded("left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = make(name, "sdpa").generate(**inputs, **options)
    assert torch.equal(make(name, "lamina").generate(**inputs, **options), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_a_chunk_into_a_filled_cache(name):
    """Several new queries against more keys: the causal corner is at the end, not at the start."""
    ids = tokens(2, 10)
    model = make(name, "lamina")
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :4], use_cache=True).past_key_values
        rest = model(ids[:, 4:], past_key_values=cache).logits
    assert_lossy(rest, whole[:, 4:], min_sqnr_db=100)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_bfloat16(name):
    outputs = {}
    for kind in ("lamina", "sdpa"):
        outputs[kind] = output_of(make(name, kind, torch.bfloat16), **padded("right"))
    rounded = make(name, "sdpa", torch.bfloat16).double()
    truth = output_of(rounded, **padded("right"))
    keep = padded("right")["attention_mask"].bool()
    floor = 2 * torch.finfo(torch.bfloat16).eps * truth.abs().max().item()
    assert_composite(outputs["lamina"][keep], outputs["sdpa"][keep], truth[keep], floor=floor)


def test_gradients_are_as_exact_as_torchs():
    def gradient(kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        model, inputs = make("bert", kind, dtype), padded("right")
        out = model(**inputs)[0]
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        (out * weights * inputs["attention_mask"].unsqueeze(-1)).sum().backward()
        return model.encoder.layer[0].attention.self.query.weight.grad

    assert_composite(gradient("lamina"), gradient("sdpa"), gradient("sdpa", torch.float64))


def test_training_mode_with_dropout():
    model = make("bert", "lamina").train()
    assert model(input_ids=tokens())[0].requires_grad


@pytest.mark.parametrize("pad", [None, "left", "right"])
@pytest.mark.parametrize("name", EAGER)
def test_models_that_sdpa_cannot_serve(name, pad):
    torch.manual_seed(0)
    eager = EAGER[name]().eval()
    for parameter in eager.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    eager.set_attn_implementation("eager")
    ours = copy.deepcopy(eager)
    assert [d.now for d in lamina.swap_(ours, lamina.FusedAttention()).decisions] == ["attention 'lamina'"]
    inputs = {"input_ids": tokens()} if pad is None else padded(pad)
    keep = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    assert_lossy(output_of(ours, **inputs)[keep], output_of(eager, **inputs)[keep], min_sqnr_db=90)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(tokens(2, 5), **options), eager.generate(tokens(2, 5), **options))


@pytest.mark.parametrize("option", ["softcap", "s_aux"])
def test_options_that_change_the_scores(option):
    module = torch.nn.Module()
    q, k = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 9, 8)
    value = 0.7 if option == "softcap" else torch.randn(3)
    out, _ = attention_forward(module, q, k, k, None, is_causal=False, **{option: value})
    scores = q @ k.mT / 8**0.5
    if option == "softcap":
        weights = (value * (scores / value).tanh()).softmax(-1)
    else:
        weights = torch.cat([scores, value.view(1, 3, 1, 1).expand(2, 3, 7, 1)], -1).softmax(-1)[..., :-1]
    assert_lossy(out.transpose(1, 2), weights @ k, min_sqnr_db=110)


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_a_position_bias_is_added_to_the_scores(mask):
    module = torch.nn.Module()
    q, k, bias = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 9, 8), torch.randn(1, 3, 7, 9)
    keep = torch.rand(2, 1, 7, 9) > 0.3
    keep[..., 0] = True
    given = {"bool": keep, "float": torch.zeros(keep.shape).masked_fill(~keep, -1e4)}.get(mask)
    out, _ = attention_forward(module, q, k, k, given, is_causal=mask == "causal", position_bias=bias)
    scores = q @ k.mT / 8**0.5 + bias
    seen = torch.ones(7, 9, dtype=torch.bool).tril() if mask == "causal" else keep if given is not None else None
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    assert_lossy(out.transpose(1, 2), scores.softmax(-1) @ k, min_sqnr_db=110)


def test_the_function_has_the_interface_of_transformers():
    """[B, H, L, D] in, [B, L, H, D] out and contiguous, and no weights."""
    module = torch.nn.Module()
    module.is_causal = True
    q, k = torch.randn(2, 6, 7, 8), torch.randn(2, 3, 7, 8)
    out, weights = attention_forward(module, q, k, k, None, scaling=0.3)
    assert weights is None
    assert out.is_contiguous()
    expected = lamina.ops.attention(q, k, k, is_causal=True, scale=0.3, enable_gqa=True)
    assert_exact(out, expected.transpose(1, 2).contiguous())
    plain, _ = attention_forward(module, q, k, k, None, scaling=0.3, is_causal=False)
    assert_exact(plain, lamina.ops.attention(q, k, k, scale=0.3, enable_gqa=True).transpose(1, 2).contiguous())


# -- swap_ and accelerate


def test_swap_switches_the_attention():
    model = make("bert", "sdpa")
    expected = output_of(model, input_ids=tokens())
    report = lamina.swap_(model, lamina.FusedAttention())
    (decision,) = report.decisions
    assert (decision.fqn, decision.was, decision.now) == ("", "attention 'sdpa'", "attention 'lamina'")
    assert model.config._attn_implementation == "lamina"
    assert_lossy(output_of(model, input_ids=tokens()), expected, min_sqnr_db=100)
    again = lamina.swap_(model, lamina.FusedAttention())
    assert again.left[0].reason == "it already uses lamina's attention"


def test_swap_of_a_model_inside_a_model():
    outer = torch.nn.ModuleDict({"encoder": make("bert", "eager"), "head": torch.nn.Linear(32, 2)})
    report = lamina.swap_(outer, [lamina.FusedAttention(), lamina.Int8Dynamic()])
    assert next(d for d in report.decisions if d.fqn == "encoder").now == "attention 'lamina'"
    assert outer["encoder"].config._attn_implementation == "lamina"
    assert sum(d.now is not None for d in report.decisions) > 10


def test_swap_leaves_other_attention_alone():
    model = make("bert", "sdpa")
    model.config._attn_implementation_internal = "flash_attention_2"
    (decision,) = lamina.swap_(model, lamina.FusedAttention()).decisions
    assert decision.now is None
    assert decision.reason == "it uses attn_implementation 'flash_attention_2', which may compute something else"


@pytest.fixture
def always_faster(monkeypatch):
    def interleaved(before, after, seconds, stopwatch):
        before(), after()
        return 2.0, 1.0

    monkeypatch.setattr(sys.modules["lamina.accelerate"], "_interleaved", interleaved)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_accelerate(name, always_faster):
    model = make(name, "sdpa")
    before = copy.deepcopy(model.state_dict())
    inputs = padded("right")
    expected = output_of(model, **inputs)
    fast = lamina.accelerate(model, inputs, max_error=0.05, compile=False)
    assert fast.model.config._attn_implementation == "lamina"
    root = next(d for d in fast.report.decisions if d.fqn == "")
    assert root.now == "attention 'lamina'"
    assert root.error < 1e-5 or len(fast.report.swapped) > 1  # measured with the int8 layers already in place
    keep = inputs["attention_mask"].bool()
    assert_lossy(output_of(fast.model, **inputs)[keep], expected[keep], min_sqnr_db=INT8_MODEL_SQNR_DB)
    # The original, config included, is as it was.
    assert model.config._attn_implementation == "sdpa"
    for key, tensor in model.state_dict().items():
        assert_exact(tensor, before[key], key)
    assert_exact(output_of(model, **inputs), expected)


def test_accelerate_attention_only(always_faster):
    model = make("llama", "sdpa")
    inputs = {"input_ids": tokens(), "use_cache": False}
    fast = lamina.accelerate(model, inputs, config=lamina.FusedAttention(), compile=False)
    assert [d.now for d in fast.report.decisions] == ["attention 'lamina'"]
    assert fast.report.error < 1e-5
    prompt = tokens(2, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.model.generate(prompt, **options), model.generate(prompt, **options))


def test_accelerate_takes_attention_back(monkeypatch):
    """When the whole model is slower, the copy has its own attention again."""
    module = sys.modules["lamina.accelerate"]
    monkeypatch.setattr(
        module,
        "_interleaved",
        lambda *timing: (2.0 if timing[2] < module._MODEL_SECONDS else 0.5, 1.0),
    )
    model = make("bert", "sdpa")
    fast = lamina.accelerate(model, {"input_ids": tokens()}, compile=False)
    assert fast.report.swapped == ()
    assert fast.model.config._attn_implementation == "sdpa"
    assert_exact(output_of(fast.model, input_ids=tokens()), output_of(model, input_ids=tokens()))


def test_compile_with_lamina_attention():
    model = make("bert", "lamina")
    ids = tokens()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")(input_ids=ids)[0]
    assert_lossy(compiled, output_of(model, input_ids=ids), min_sqnr_db=100)


def test_save_and_load_of_a_swapped_transformer(tmp_path):
    model = make("gpt2", "lamina")
    lamina.swap_(model, lamina.Int8Dynamic())
    lamina.save(model, tmp_path / "gpt2.safetensors")
    fresh = make("gpt2", "lamina")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(0.1)
    lamina.load_(fresh, tmp_path / "gpt2.safetensors")
    assert_exact(output_of(fresh, input_ids=tokens()), output_of(model, input_ids=tokens()))


@pytest.mark.parametrize("config", [lamina.Int8Dynamic(), lamina.Int8WeightOnly(), lamina.Int4WeightOnly()], ids=str)
def test_weights_can_be_tied_again(config):
    """The quantized head takes the embedding's weights once more, and stays quantized."""
    model = make("gpt2", "sdpa")
    lamina.swap_(model, config)
    expected = output_of(model, input_ids=tokens())
    model.tie_weights()
    assert_exact(output_of(model, input_ids=tokens()), expected)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2.0)
    model.tie_weights()
    head = model.get_output_embeddings()
    assert type(head).__module__.startswith("lamina.nn")
    assert_lossy(head.weight + 0, model.get_input_embeddings().weight, min_sqnr_db=15)
    with pytest.raises(ValueError, match=r"size mismatch for weight: \[3, 32\]"):
        head.weight = torch.nn.Parameter(torch.zeros(3, 32))
