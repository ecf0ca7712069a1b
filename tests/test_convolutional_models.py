"""Convolutional networks of lamina.models and of the transformers package, small and random, through accelerate and
swap_: taken as they are defined. Nothing in lamina knows these models by name."""

import copy
import functools
import math
import sys

import pytest
import torch
from test_models import SMALL
from tolerances import assert_exact, assert_lossy, int8_model_sqnr_db
from torch import nn

import lamina
from lamina import data, models, train
from lamina.nn.convs import as_conv
from lamina.nn.linears import as_linear
from lamina.running import floats

transformers = pytest.importorskip("transformers", reason="pip install lamina[models]")

# Float convolutions differ from torch's by the order of their sums and, by Winograd, a few roundings more.
FLOAT_SQNR_DB = 100.0


@pytest.fixture(autouse=True)
def one_thread():
    """These layers are too small to share out; on a busy machine the threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def always_faster(monkeypatch):
    """Speed is not judged here."""

    def interleaved(before, after, seconds, stopwatch):
        before(), after()
        return 2.0, 1.0

    monkeypatch.setattr(sys.modules["lamina.accelerate"], "_interleaved", interleaved)


def of(model: str, config: str, **options):
    return getattr(transformers, model)(getattr(transformers, config)(**options))


def feature_encoder(**options):
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

    return Wav2Vec2FeatureEncoder(transformers.Wav2Vec2Config(conv_dim=(24,) * 7, **options))


def own(name: str, **overrides):
    options = {**SMALL.get(name, {}), **overrides}
    return lambda: models.create(name, **options), tuple(models.example_inputs(name, 2, **options)[0].shape)


IMAGES = (2, 3, 64, 64)
STAGES = {"hidden_sizes": [32, 64], "depths": [1, 2], "num_labels": 10}
# How to build it, and the shape of its input.
MODELS = {
    "lenet": own("lenet"),
    "cnn": own("cnn"),
    "vgg": own("vgg11", batch_norm=True),
    "resnet18": own("resnet18"),
    "resnet50": own("resnet50", depths=(1, 1, 1, 1)),
    "unet": own("unet"),
    "fcn": own("fcn8s"),
    "resnet_hf": (
        lambda: of("ResNetForImageClassification", "ResNetConfig", embedding_size=16, **STAGES),
        IMAGES,
    ),
    "mobilenet_v2": (
        lambda: of(
            *("MobileNetV2ForImageClassification", "MobileNetV2Config"),
            **{"depth_multiplier": 0.25, "image_size": 64, "num_labels": 10},
        ),
        IMAGES,
    ),
    "efficientnet": (
        lambda: of(
            *("EfficientNetForImageClassification", "EfficientNetConfig"),
            **{"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "num_labels": 10},
        ),
        IMAGES,
    ),
    "convnext": (
        lambda: of("ConvNextForImageClassification", "ConvNextConfig", num_stages=2, **STAGES),
        IMAGES,
    ),
    "regnet": (
        lambda: of("RegNetForImageClassification", "RegNetConfig", embedding_size=16, groups_width=16, **STAGES),
        IMAGES,
    ),
    "segformer": (
        lambda: of(
            *("SegformerForSemanticSegmentation", "SegformerConfig"),
            **{"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "decoder_hidden_size": 32},
            **{"sr_ratios": [4, 1], "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2]},
            **{"mlp_ratios": [2, 2], "num_labels": 5},
        ),
        IMAGES,
    ),
    "yolos": (
        lambda: of(
            *("YolosForObjectDetection", "YolosConfig"),
            **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
            **{"image_size": [64, 64], "num_detection_tokens": 10, "num_labels": 5},
        ),
        IMAGES,
    ),
    "wav2vec2": (feature_encoder, (2, 1600)),
    "wav2vec2_layer_norm": (lambda: feature_encoder(feat_extract_norm="layer"), (2, 1600)),
}
DETECTOR = own("detector")
every_model = pytest.mark.parametrize("name", MODELS)


def images(shape: tuple[int, ...]) -> torch.Tensor:
    """With shapes that are larger than a pixel, by which one image differs from the next; or noise as sound."""
    noise = torch.randn(shape)
    if len(shape) == 2:
        return noise
    coarse = torch.randn(*shape[:2], 4, 4)
    return nn.functional.interpolate(coarse, size=shape[2:], mode="bilinear") + noise / 2


def as_trained(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Weights that keep the size of what they multiply, and batch norm with statistics of such inputs.

    As transformers initializes EfficientNet, nothing but zeros would come out of its first blocks. Batch norm divides
    by the root mean square: where channels of a random network hardly vary, their deviation is mostly noise.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(module.weight, std=math.sqrt(2 / module.weight[0].numel()))
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.8, 1.2)
        nn.init.normal_(norm.bias, std=0.5)
    with torch.no_grad():
        model.train()(x)
    for norm in norms:
        norm.running_var += norm.running_mean**2
    return model.eval()


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    build, (batch, *shape) = DETECTOR if name == "detector" else MODELS[name]
    torch.manual_seed(0)
    model, x = build(), images((8 * batch, *shape))
    return as_trained(model, x), x[:batch]


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return floats(model(x))


def layers_of(model: nn.Module) -> set[str]:
    """All that int8 can take."""
    return {fqn for fqn, m in model.named_modules() if as_conv(m) is not None or as_linear(m) is not None}


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor], min_sqnr_db: float) -> None:
    assert len(actual) == len(expected) > 0
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_lossy(a, e, min_sqnr_db=min_sqnr_db, what=f"output {number}")


@pytest.mark.filterwarnings("ignore:.*Dynamo detected a call to a `functools.lru_cache`")
@every_model
def test_accelerate_int8_static(name, tmp_path):
    """Layers and graph together agree with the model, and the layers come back from a file with their scales."""
    torch._dynamo.reset()
    model, x = make(name)
    expected, layers = outputs(model, x), layers_of(model)
    fast = lamina.accelerate(model, (x,), lamina.Int8Static([(x,)]), max_error=0.1)
    assert {d.fqn for d in fast.report.swapped} == layers
    assert fast.report.form.startswith("swapped layers"), fast.report.forms
    assert all(form.error is not None for form in fast.report.forms), fast.report.forms
    assert_close(outputs(fast.model, x), expected, int8_model_sqnr_db(len(layers)))

    lamina.save(fast.model, tmp_path / "model.safetensors")
    fresh = MODELS[name][0]().eval()
    lamina.load_(fresh, tmp_path / "model.safetensors")
    for actual, wanted in zip(outputs(fresh, x), outputs(copy.deepcopy(fast.model), x), strict=True):
        assert_exact(actual, wanted)


@every_model
def test_accelerate_auto(name):
    """Layer by layer, on images of one size and then of another in channels_last."""
    model, x = make(name)
    layers = layers_of(model)
    fast = lamina.accelerate(model, (x,), max_error=0.1, compile=False)
    assert {d.fqn for d in fast.report.swapped} >= layers
    for form in (x, x.flip(0)[:1].contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x[:, :1200]):
        assert_close(outputs(fast.model, form), outputs(model, form), int8_model_sqnr_db(len(layers)))


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("wav2vec2")])  # it has no Conv2d
def test_swap_float_convolutions(name):
    model, x = make(name)
    expected = outputs(model, x)
    convolutions = {fqn for fqn, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {d.fqn for d in lamina.swap_(model, lamina.FusedConv()).swapped} == convolutions
    assert_close(outputs(model, x), expected, FLOAT_SQNR_DB)


@pytest.mark.parametrize("config", ["auto", "static", "float"])
def test_detector(config):
    """What it selects hangs on near ties, so its parts are judged, each on the float model's inputs, and that what
    float and int8 find is for the most part the same."""
    model, x = make("detector")
    configs = {"auto": "auto", "static": lamina.Int8Static([(x,)]), "float": lamina.FusedConv()}
    fast = lamina.accelerate(model, (x,), configs[config], max_error=0.1, max_model_error=math.inf, compile=False).model
    assert len(layers_of(fast) & layers_of(model)) == (4 if config == "float" else 0)
    bound = FLOAT_SQNR_DB if config == "float" else int8_model_sqnr_db(len(layers_of(model)))
    with torch.no_grad():
        features = model.backbone(x)
        assert_close([fast.backbone(x)], [features], bound)
        scored = model.score_anchors(features)
        assert_close(list(fast.score_anchors(features)), list(scored), bound)
        proposals = model.propose(*scored)
        judged = model.judge(features, proposals)
        assert_close(list(fast.judge(features, proposals)), list(judged), bound)
        (boxes, scores, labels), (fast_boxes, fast_scores, fast_labels) = model(x), fast(x)
    for image in range(len(x)):
        apart = torch.cdist(boxes[image], fast_boxes[image], p=math.inf)
        same = (apart < 4) & (labels[image][:, None] == fast_labels[image]) & (scores[image] > 0)[:, None]
        assert same.any(1).sum() > (scores[image] > 0).sum() / 2
    torch.testing.assert_close(fast_scores, scores, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("name", "epochs"), [("lenet", 2), ("cnn", 1)])
def test_accuracy_on_mnist(name, epochs):
    """Trained no longer than it takes to be right about most digits, which leaves many near the border."""
    trained = train.train(name, epochs=epochs, progress=False)
    splits = data.mnist()
    before = trained.metrics.accuracy
    assert before > 0.85
    configs = {"float": lamina.FusedConv(winograd=4), "dynamic": lamina.Int8Dynamic()}
    configs["static"] = lamina.Int8Static([(splits.validation.x[:64],)])
    for precision, config in configs.items():
        model = copy.deepcopy(trained.model)
        assert lamina.swap_(model, config).swapped
        after = train.evaluate(model, *splits.test).accuracy
        assert after >= before - (0.0 if precision == "float" else 0.005), precision


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 5)),
        *(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3, padding=1, groups=8)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    return as_trained(model, images((16, 3, 32, 32)))


@pytest.mark.parametrize("config", ["static", "auto", "float"])
def test_inputs_of_other_forms(config):
    """No images, other layouts and sizes, and what does not fit, for a network that was compiled for its example."""
    torch._dynamo.reset()
    model, x = small_network(), images((2, 3, 32, 32))
    configs = {"auto": "auto", "static": lamina.Int8Static([(x,)]), "float": lamina.FusedConv()}
    report = (fast := lamina.accelerate(model, (x,), configs[config], max_error=0.1)).report
    assert report.form == "swapped layers, compiled", report.forms
    bound = FLOAT_SQNR_DB if config == "float" else int8_model_sqnr_db(len(report.swapped))
    fast = fast.model
    with torch.no_grad():
        expected = fast(x)
        assert_lossy(expected, model(x), min_sqnr_db=bound)
        strided = images((4, 3, 32, 64))[::2, :, :, ::2].copy_(x)
        for form in (x.contiguous(memory_format=torch.channels_last), strided):
            assert_lossy(fast(form), expected, min_sqnr_db=FLOAT_SQNR_DB)
        assert_lossy(fast(x[:, :, 5:, 1:]), model(x[:, :, 5:, 1:]), min_sqnr_db=bound)
        empty = fast(x[:0])
        assert empty.shape == (0, 5)
        assert empty.dtype == torch.float32
        # The first layer's outputs are smaller than the kernel of the second.
        for unfit, message in (
            (x[..., :5, :5], r"conv2d: .*(kernel covers 5|kernel's reach of \[5, 5\])"),
            (x[:, :2], "2 channels"),
        ):
            with pytest.raises(ValueError, match=message) as error:
                fast(unfit)
            assert "\n" not in str(error.value)


def test_calibration_on_other_inputs():
    """Images of another size are as good as any; none give no scale; of other channels the model says so itself."""
    model, x = small_network(), images((2, 3, 32, 32))
    accelerate = functools.partial(lamina.accelerate, max_error=0.1, compile=False)
    report = accelerate(model, (x,), lamina.Int8Static([(images((16, 3, 48, 40)),)])).report
    assert len(report.swapped) == len(report.decisions) == 4
    report = accelerate(model, (x,), lamina.Int8Static([(x[:0],)])).report
    assert {d.reason for d in report.left} == {
        "its input has no static scale: no values were observed, so there is no range"
    }
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels, but got 4 channels instead"):
        accelerate(model, (x,), lamina.Int8Static([(images((1, 4, 32, 32)),)]))
    assert_exact(list(model.state_dict().values()), list(before.values()))


def test_a_network_gives_the_same_bits_on_every_isa():
    """Calibrated layers that pass their codes on, compiled, on one thread and on two."""
    torch._dynamo.reset()
    model, x = small_network(), images((2, 3, 32, 32))
    lamina.swap_(model, lamina.Int8Static([(x,)]))
    report = lamina.compile.compile_(model, (x,), options={"measure": False})
    assert report.fused["int8_conv2d writes codes"] == 2, report
    found = []
    with torch.no_grad():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for isa in lamina._C.available_isas():
                with lamina.force_isa(isa):
                    found.append(model(x))
    for output in found:
        assert_exact(output, found[0])
