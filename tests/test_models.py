"""The reference models do what their papers say: shapes, masks, causality, sizes."""

import dataclasses

import pytest
import torch
import transformers
from torch import nn

from lamina import models
from lamina.models.attention import AdditiveAttention, MultiHeadSelfAttention, ScaledDotProductAttention
from lamina.models.detector import overlap, roi_align, suppress
from lamina.models.registry import register

# Shrinks the configs that take seconds to build; what is tested does not depend on the size.
SMALL = {
    "bert_base": {"vocab": 120, "dim": 48, "heads": 4, "layers": 3, "ffn": 96},
    "bert_tiny": {"vocab": 120},
    "detector": {
        **{"image_size": 64, "depths": (1, 1, 1), "width": 8, "anchor_sizes": (8, 16, 32), "candidates": 60},
        **{"proposals": 12, "detections": 6, "hidden": 32, "num_classes": 5},
    },
    "fcn8s": {"depths": (1, 1, 1, 1), "width": 8, "image_size": 32, "hidden": 32, "hidden_kernel": 3},
    "gpt2": {"vocab": 120, "dim": 48, "heads": 4, "layers": 3, "positions": 64},
    "resnet18": {"width": 8, "image_size": 48, "num_classes": 10},
    "resnet50": {"width": 8, "image_size": 48, "num_classes": 10},
    "seq2seq": {"source_vocab": 90, "target_vocab": 80, "embedding": 24, "hidden": 32},
    "seq2seq_dates": {"embedding": 24, "hidden": 32},
    "unet": {"width": 8, "levels": 2, "image_size": 32},
    **{
        name: {"width": 4, "image_size": 32, "hidden": 32, "num_classes": 10}
        for name in ("vgg11", "vgg16", "vgg16_bn", "vgg19")
    },
    "vit_base": {"dim": 48, "heads": 4, "layers": 2, "ffn": 96, "image_size": 48, "num_classes": 10},
}

BATCH = 3

OUTPUT_SHAPES = {
    "bert_base": [(BATCH, 128, 120), (BATCH, 2)],
    "bert_tiny": [(BATCH, 128, 120), (BATCH, 2)],
    "cnn": [(BATCH, 10)],
    "detector": [(BATCH, 6, 4), (BATCH, 6), (BATCH, 6)],
    "fcn8s": [(BATCH, 21, 32, 32)],
    "gpt2": [(BATCH, 64, 120)],
    "gpt_tiny": [(BATCH, 128, 1000)],
    "gru": [(BATCH, 10)],
    "lenet": [(BATCH, 10)],
    "lstm": [(BATCH, 10)],
    "mlp": [(BATCH, 10)],
    "resnet18": [(BATCH, 10)],
    "resnet50": [(BATCH, 10)],
    "seq2seq": [(BATCH, 20, 80)],
    "seq2seq_dates": [(BATCH, 20, 14)],
    "unet": [(BATCH, 2, 32, 32)],
    **{name: [(BATCH, 10)] for name in ("vgg11", "vgg16", "vgg16_bn", "vgg19")},
    "vit_base": [(BATCH, 10)],
    "vit_mnist": [(BATCH, 10)],
}


def make(name, **overrides):
    """A small seeded model in eval mode."""
    torch.manual_seed(0)
    return models.create(name, **{**SMALL.get(name, {}), **overrides}).eval()


def make_inputs(name, batch=BATCH):
    torch.manual_seed(1)
    return models.example_inputs(name, batch, **SMALL.get(name, {}))


@pytest.mark.parametrize("name", models.names())
def test_forward_shape(name):
    with torch.no_grad():
        outputs = make(name)(*make_inputs(name))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert [tuple(output.shape) for output in outputs] == OUTPUT_SHAPES[name]
    for number, output in enumerate(outputs):
        labels = name == "detector" and number == 2
        assert output.dtype == (torch.int64 if labels else torch.float32)
        assert output.isfinite().all()


@pytest.mark.parametrize("name", models.names())
def test_every_parameter_is_used(name):
    model = make(name).train()
    outputs = model(*make_inputs(name))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(output.square().mean() for output in outputs).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", models.names())
def test_create_is_deterministic_under_a_seed(name):
    first, second = make(name).state_dict(), make(name).state_dict()
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    torch.manual_seed(7)
    other = models.create(name, **SMALL.get(name, {})).state_dict()
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", models.names())
def test_one_output_does_not_depend_on_the_rest_of_the_batch(name):
    model, inputs = make(name), make_inputs(name)
    with torch.no_grad():
        together = model(*inputs)
        alone = model(*(part[1:2] for part in inputs))
    if not isinstance(together, tuple):
        together, alone = (together,), (alone,)
    for full, single in zip(together, alone, strict=True):
        # Only the order of the sums differs: other batch sizes take other GEMM blockings.
        torch.testing.assert_close(full[1:2], single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", 784 * 128 + 128 + 128 * 10 + 10),
        ("lenet", 61_706),
        ("cnn", 421_642),
        ("vgg11", 132_863_336),
        ("vgg16", 138_357_544),
        ("vgg16_bn", 138_365_992),
        ("vgg19", 143_667_240),
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("bert_base", 110_106_428),
        ("gpt2", 124_439_808),
        ("vit_base", 86_567_656),
    ],
)
def test_parameter_count_is_the_published_one(name, expected):
    # On the meta device nothing is allocated or drawn.
    with torch.device("meta"):
        model = models.create(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_names_are_all_there():
    assert set(models.names()) == set(OUTPUT_SHAPES)
    assert models.names() == sorted(models.names())


def test_unknown_name_lists_the_known_ones():
    for call in (models.create, models.example_inputs):
        with pytest.raises(ValueError, match=r"no model 'lennet'; the known ones are bert_base, .*vit_mnist$"):
            call("lennet")


def test_unknown_config_field_lists_the_fields():
    with pytest.raises(ValueError, match=r"'mlp' has no config field 'depth'; its fields are in_channels, .*hidden"):
        models.create("mlp", depth=3)


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="model name 'mlp' of Other is already taken by MLP"):

        @register(mlp=None)
        class Other(nn.Module):
            pass


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("resnet18", {"stem": "huge"}, "stem is 'huge'"),
        ("resnet18", {"block": "wide"}, "block is 'wide'"),
        ("lstm", {"cell": "rnn"}, "cell is 'rnn'"),
        ("seq2seq", {"cell": "rnn"}, "cell is 'rnn'"),
        ("seq2seq", {"attention": "general"}, "attention is 'general'"),
        ("vgg16", {"image_size": 100}, "image_size 100 cannot be halved 5 times"),
        ("fcn8s", {"depths": (1, 1)}, r"last three stages, but depths \(1, 1\) has fewer"),
        ("detector", {"image_size": 100}, "image_size 100 is no multiple of its stride 16"),
        ("vit_mnist", {"patch": 5}, "patch 5 does not divide image_size 28"),
        ("gpt_tiny", {"heads": 3}, "width 128 does not divide into 3 heads"),
    ],
)
def test_impossible_configs_are_refused(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, **overrides)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        models.create("lenet").config.num_classes = 5


@pytest.mark.parametrize("name", ["bert_tiny", "gpt_tiny", "vit_mnist"])
def test_attention_goes_through_the_leaf(name):
    """What lamina's swap needs: one ScaledDotProductAttention a layer, and it is what the output comes from."""
    model, inputs = make(name), make_inputs(name)
    leaves = [module for module in model.modules() if isinstance(module, ScaledDotProductAttention)]
    assert len(leaves) == model.config.layers
    with torch.no_grad():
        before = model(*inputs)
        for leaf in leaves:
            leaf.forward = lambda query, key, value, attn_mask=None, is_causal=False: torch.zeros_like(query)
        after = model(*inputs)
    first = (lambda output: output[0]) if isinstance(before, tuple) else (lambda output: output)
    assert not torch.allclose(first(before), first(after))


def test_attention_equals_the_formula():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 1, 5, 5) > 0.3
    mask[..., 0] = True
    scores = (query @ key.mT / 8**0.5).masked_fill(~mask, float("-inf"))
    expected = scores.softmax(-1) @ value
    torch.testing.assert_close(ScaledDotProductAttention()(query, key, value, attn_mask=mask), expected)


def test_additive_attention_ignores_what_the_mask_hides():
    torch.manual_seed(0)
    attention = AdditiveAttention(8)
    query, memory = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 6, 8)
    mask = (torch.arange(6) < 4).expand(2, 1, 1, 6)
    hidden = attention(query, memory, memory, attn_mask=mask)
    torch.testing.assert_close(hidden, attention(query, memory[:, :, :4], memory[:, :, :4]))
    assert not torch.allclose(hidden, attention(query, memory, memory))


def test_self_attention_without_bias_has_none():
    module = MultiHeadSelfAttention(16, heads=2, bias=False)
    assert all(linear.bias is None for linear in module.modules() if isinstance(linear, nn.Linear))


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool])
def test_bert_ignores_padded_tokens(mask_dtype):
    model = make("bert_base")
    torch.manual_seed(1)
    tokens = torch.randint(0, 120, (2, 12))
    mask = torch.ones(2, 12, dtype=mask_dtype)
    mask[:, 8:] = 0
    other = tokens.clone()
    other[:, 8:] = torch.randint(0, 120, (2, 4))
    assert not torch.equal(tokens, other)
    with torch.no_grad():
        words, sentence = model(tokens, mask)
        words_other, sentence_other = model(other, mask)
        words_short, sentence_short = model(tokens[:, :8])
        words_unmasked, _ = model(tokens)
    assert torch.equal(words[:, :8], words_other[:, :8])
    assert torch.equal(sentence, sentence_other)
    torch.testing.assert_close(words[:, :8], words_short, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sentence, sentence_short, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(words[:, :8], words_unmasked[:, :8], rtol=1e-4, atol=1e-5)


def test_bert_sees_both_directions_and_the_segment():
    model = make("bert_base")
    tokens = torch.arange(12)[None]
    later = tokens.clone()
    later[0, -1] = 77
    with torch.no_grad():
        words, _ = model(tokens)
        words_later, _ = model(later)
        words_second, _ = model(tokens, token_type_ids=torch.ones_like(tokens))
    assert not torch.allclose(words[:, 0], words_later[:, 0])
    assert not torch.allclose(words, words_second)


def test_bert_equals_transformers():
    theirs = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=120,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=512,
        )
    ).eval()
    model = make("bert_base")
    weights = renamed(
        theirs.state_dict(),
        {
            "bert.embeddings.word_embeddings": "word_embedding",
            "bert.embeddings.position_embeddings": "position_embedding",
            "bert.embeddings.token_type_embeddings": "segment_embedding",
            "bert.embeddings.LayerNorm": "embedding_norm",
            "bert.encoder.layer": "layers",
            "attention.self.": "attention.",
            "attention.output.dense": "attention.out",
            "attention.output.LayerNorm": "attention_norm",
            "intermediate.dense": "ffn.0",
            "output.dense": "ffn.2",
            "output.LayerNorm": "ffn_norm",
            "bert.pooler.dense": "pooler.0",
            "cls.seq_relationship": "next_sentence_head",
            "cls.predictions.transform.dense": "word_transform.0",
            "cls.predictions.transform.LayerNorm": "word_transform.2",
            "cls.predictions.decoder": "word_head",
            "cls.predictions.bias": "word_head.bias",
        },
    )
    model.load_state_dict(weights)
    torch.manual_seed(1)
    tokens, segments = torch.randint(0, 120, (2, 12)), torch.randint(0, 2, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    with torch.no_grad():
        words, sentence = model(tokens, mask, segments)
        expected = theirs(tokens, attention_mask=mask, token_type_ids=segments)
    torch.testing.assert_close(words[mask.bool()], expected.prediction_logits[mask.bool()], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sentence, expected.seq_relationship_logits, rtol=1e-4, atol=1e-5)


def renamed(weights, names):
    """`weights` with every key rewritten by the replacements, in order."""
    result = {}
    for key, weight in weights.items():
        for old, new in names.items():
            key = key.replace(old, new)
        result[key] = weight
    return result


def test_gpt_equals_transformers():
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=120, n_positions=64, n_embd=48, n_layer=3, n_head=4)
    ).eval()
    model = make("gpt2")
    weights = renamed(
        theirs.state_dict(),
        {
            "transformer.wte": "word_embedding",
            "transformer.wpe": "position_embedding",
            "transformer.ln_f": "norm",
            "transformer.h": "layers",
            "ln_1": "attention_norm",
            "ln_2": "ffn_norm",
            "attn.c_proj": "attention.out",
            "mlp.c_fc": "ffn.0",
            "mlp.c_proj": "ffn.2",
            "lm_head": "head",
        },
    )
    linear = ("attn.c_attn.weight", "attention.out.weight", "ffn.0.weight", "ffn.2.weight")
    for key in list(weights):
        if key.endswith(linear):
            weights[key] = weights[key].T  # [in, out] of their Conv1D -> [out, in]
    for key in [key for key in weights if "c_attn" in key]:
        for part, projection in zip(weights.pop(key).chunk(3), ("query", "key", "value"), strict=True):
            weights[key.replace("attn.c_attn", f"attention.{projection}")] = part
    model.load_state_dict(weights)
    torch.manual_seed(1)
    tokens = torch.randint(0, 120, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", [1, 9, 15])
def test_gpt_is_causal(changed):
    model = make("gpt_tiny")
    torch.manual_seed(1)
    tokens = torch.randint(0, 1000, (2, 16))
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % 1000
    with torch.no_grad():
        logits, logits_other = model(tokens), model(other)
    assert torch.equal(logits[:, :changed], logits_other[:, :changed])
    assert not torch.allclose(logits[:, changed:], logits_other[:, changed:])


def test_gpt_generates_its_own_argmax_and_keeps_within_its_context():
    model = make("gpt_tiny", positions=8)
    torch.manual_seed(1)
    prompt = torch.randint(0, 1000, (2, 5))
    output = model.generate(prompt, max_new_tokens=6)
    assert output.shape == (2, 11)
    assert torch.equal(output[:, :5], prompt)
    assert torch.equal(output, model.generate(prompt, max_new_tokens=6))
    with torch.no_grad():
        for end in range(5, 11):
            expected = model(output[:, max(0, end - 8) : end])[:, -1].argmax(-1)
            assert torch.equal(output[:, end], expected)


@pytest.mark.parametrize("name", ["gpt_tiny", "bert_tiny"])
def test_the_head_is_the_word_embedding(name):
    model = make(name)
    head = model.head if name == "gpt_tiny" else model.word_head
    assert head.weight is model.word_embedding.weight


@pytest.fixture(params=[(cell, attention) for cell in ("gru", "lstm") for attention in ("additive", "dot")])
def translator(request):
    cell, attention = request.param
    return make("seq2seq", cell=cell, attention=attention, layers=2)


def test_seq2seq_greedy_decode_is_the_argmax_of_forward(translator):
    source, _ = make_inputs("seq2seq")
    decoded = translator.greedy_decode(source, max_length=9)
    assert decoded.shape == (BATCH, 9)
    assert decoded.dtype == torch.int64
    assert torch.equal(decoded, translator.greedy_decode(source, max_length=9))
    begun = torch.cat((torch.full((BATCH, 1), translator.config.bos), decoded[:, :-1]), dim=1)
    with torch.no_grad():
        expected = translator(source, begun).argmax(-1)
    # After eos there is only padding.
    live = (decoded == translator.config.eos).cumsum(1) - (decoded == translator.config.eos).long() == 0
    assert torch.equal(decoded[live], expected[live])
    assert (decoded[~live] == translator.config.pad).all()


def test_seq2seq_pads_after_the_end():
    model = make("seq2seq")
    with torch.no_grad():
        model.head.bias[model.config.eos] = 100.0
    decoded = model.greedy_decode(make_inputs("seq2seq")[0], max_length=4)
    assert decoded.tolist() == [[model.config.eos] + [model.config.pad] * 3] * BATCH


def test_seq2seq_ignores_source_padding(translator):
    source, target = make_inputs("seq2seq")
    lengths = torch.tensor([24, 10, 17])
    other = source.clone()
    for row, length in zip(other, lengths, strict=True):
        row[length:] = translator.config.pad
    assert not torch.equal(source, other)
    with torch.no_grad():
        logits = translator(source, target, lengths)
        assert torch.equal(logits, translator(other, target, lengths))
        alone = translator(source[1:2, :10], target[1:2])
    torch.testing.assert_close(logits[1:2], alone, rtol=1e-4, atol=1e-5)


def test_seq2seq_target_is_causal(translator):
    source, target = make_inputs("seq2seq")
    other = target.clone()
    other[:, 12] = 3 + (other[:, 12] - 2) % 70
    assert not torch.equal(target, other)
    with torch.no_grad():
        logits, logits_other = translator(source, target), translator(source, other)
    assert torch.equal(logits[:, :12], logits_other[:, :12])
    assert not torch.allclose(logits[:, 12], logits_other[:, 12])


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_stem_sets_the_resolution(name, stem):
    model = make(name, stem=stem, in_channels=1, depths=(1, 1))
    with torch.no_grad():
        features = model.stages(model.stem(torch.rand(2, 1, 32, 32)))
    assert features.shape[2:] == ((4, 4) if stem == "imagenet" else (16, 16))
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 10)


def test_resnet_in_eval_mode_leaves_its_statistics():
    model = make("resnet18")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model(*make_inputs("resnet18"))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vgg_alternates_as_in_table_1(batch_norm):
    features = make("vgg11", batch_norm=batch_norm).features
    kinds = "".join(type(layer).__name__[0] for stage in features for layer in stage)
    conv = "CBR" if batch_norm else "CR"
    assert kinds == f"{conv}M{conv}M{conv}{conv}M{conv}{conv}M{conv}{conv}M"


def test_fcn_enlarges_by_bilinear_interpolation_at_first():
    layer = make("fcn8s").enlarge_sum
    x = torch.randn(2, 21, 5, 6)
    expected = nn.functional.interpolate(x, scale_factor=4.0, mode="bilinear")
    with torch.no_grad():
        # At the border interpolation repeats the last pixel, a convolution has zeros there.
        torch.testing.assert_close(layer(x)[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2])


@pytest.mark.parametrize("name", ["fcn8s", "unet"])
def test_segmentation_takes_other_sizes_and_answers_every_pixel(name):
    model = make(name)
    channels = model.config.in_channels
    with torch.no_grad():
        whole = model(torch.rand(1, channels, 48, 32))
        assert whole.shape[2:] == (48, 32)
        assert whole.flatten(2).std(2).min() > 0


def greedy(boxes, scores, threshold):
    """Non-maximum suppression as it is told: the best box, without all that it overlaps, and so on."""
    over, stays = overlap(boxes[None])[0] > threshold, []
    for box in scores.argsort(descending=True, stable=True).tolist():
        if not any(over[other, box] for other in stays):
            stays.append(box)
    return sorted(stays)


def test_detector_suppresses_as_the_greedy_algorithm():
    generator = torch.Generator().manual_seed(2)
    corner, size = torch.rand(3, 40, 2, generator=generator), torch.rand(3, 40, 2, generator=generator)
    boxes = torch.cat((corner, corner + size), 2)
    scores = (torch.rand(3, 40, generator=generator) * 10).round()  # many are equal
    stays = suppress(boxes, scores, 0.3)
    assert [row.nonzero().flatten().tolist() for row in stays] == [
        greedy(*each, 0.3) for each in zip(boxes, scores, strict=True)
    ]
    assert 3 < stays.sum() < 100


def test_detector_overlap():
    boxes = torch.tensor([[[0.0, 0, 4, 2], [2, 0, 6, 2], [4, 0, 5, 1], [1, 1, 1, 1]]])
    torch.testing.assert_close(
        overlap(boxes)[0],
        torch.tensor([[1, 1 / 3, 0, 0], [1 / 3, 1, 1 / 8, 0], [0, 1 / 8, 1, 0], [0, 0, 0, 0]]),
    )


def test_detector_roi_align_samples_the_middle_of_each_part():
    """Of a map that rises evenly, the mean of a part is the value in its middle."""
    y, x = torch.meshgrid(torch.arange(12) + 0.5, torch.arange(16) + 0.5, indexing="ij")
    features = torch.stack((x, y, x + 10 * y))[None].repeat(2, 1, 1, 1)
    boxes = torch.tensor([[[2.0, 3, 8, 9], [1, 1, 13, 4]]]).repeat(2, 1, 1)
    sampled = roi_align(features, boxes, 3)
    assert sampled.shape == (2, 2, 3, 3, 3)
    across, down = torch.tensor([3.0, 5, 7]), torch.tensor([1.5, 2.5, 3.5])
    torch.testing.assert_close(sampled[1, 0, 0], across.expand(3, 3))
    torch.testing.assert_close(sampled[0, 1, 1], down[:, None].expand(3, 3))
    torch.testing.assert_close(sampled[:, :, 2], sampled[:, :, 0] + 10 * sampled[:, :, 1])


def test_detector_gives_apart_boxes_in_the_image_best_first():
    model = make("detector")
    with torch.no_grad():
        boxes, scores, labels = model(*make_inputs("detector"))
    assert (boxes >= 0).all()
    assert (boxes <= 64).all()
    assert (boxes[..., 2:] >= boxes[..., :2]).all()
    assert (scores.diff(dim=1) <= 0).all()
    assert ((labels >= 0) & (labels < 5)).all()
    same = (labels[:, :, None] == labels[:, None, :]) & (scores > 0)[:, :, None] & (scores > 0)[:, None, :]
    assert (overlap(boxes)[same & ~torch.eye(6, dtype=torch.bool)] <= 0.5).all()


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_rnn_classifier_reads_rows_in_order(name):
    model = make(name)
    (images,) = make_inputs(name)
    with torch.no_grad():
        _, state = model.rnn(images[:, 0])
        last = state[0][-1] if name == "lstm" else state[-1]
        torch.testing.assert_close(model(images), model.head(last))
        assert not torch.allclose(model(images), model(images.flip(2)))


def test_rnn_classifier_bidirectional():
    model = make("lstm", bidirectional=True, layers=2)
    (images,) = make_inputs("lstm")
    with torch.no_grad():
        outputs, _ = model.rnn(images[:, 0])
        # The forward direction ends at the last step, the backward one at the first.
        expected = torch.cat((outputs[:, -1, :128], outputs[:, 0, 128:]), dim=1)
        torch.testing.assert_close(model(images), model.head(expected))
