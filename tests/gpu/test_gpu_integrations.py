"""What sends attention of other people's models to lamina on a GPU: torch's registry, new layers, transformers."""

import copy

import pytest
import torch
from tolerances import assert_composite, assert_lossy, eps
from torch import nn
from torch.nn import functional as F

import lamina
from lamina.integrations import sdpa
from lamina.reference.attention import attention as reference

ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities in the interpreter

# Products of float32 are made of three of TF32 on tensor cores.
MIN_SQNR_DB = 80


@pytest.fixture
def active(device, monkeypatch):
    """torch's op is lamina's on the device of the test, and the calls that lamina takes are counted."""
    calls = []
    original = sdpa.attention
    monkeypatch.setattr(sdpa, "attention", lambda *args: (calls.append(args), original(*args))[1])
    if not ON_GPU:
        monkeypatch.setattr(sdpa, "_KEYS_OF_GPU", ("AutogradCPU", "CPU"))
    sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("lamina")
    yield calls
    torch.nn.attention.restore_flash_attention_impl()


def heads(device: str, *counts: int, queries: int = 19, keys: int = 37) -> list[torch.Tensor]:
    lengths = queries, keys, keys
    return [torch.randn(2, h, n, 16, device=device) for h, n in zip(counts, lengths, strict=True)]


CALLS = {
    "bool mask, fewer heads of keys": lambda device: (
        heads(device, 4, 2, 2),
        {"attn_mask": torch.rand(2, 1, 19, 37, device=device) > 0.3, "enable_gqa": True},
    ),
    "bias": lambda device: (heads(device, 2, 2, 2), {"attn_mask": torch.randn(2, 19, 37, device=device)}),
    "causal of float32, more keys than queries": lambda device: (heads(device, 2, 2, 2), {"is_causal": True}),
}


@pytest.mark.parametrize("name", CALLS)
def test_torchs_op_is_laminas_with_its_gradient(name, device, active):
    (q, k, v), options = CALLS[name](device)
    grad = torch.randn_like(q)
    learned = [options["attn_mask"]] if name == "bias" else []

    def of(dtype, function):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v, *learned)]
        given = {**options, "attn_mask": leaves[3]} if learned else options
        out = function(*leaves[:3], **given)
        return out, *torch.autograd.grad(out, leaves, grad.to(dtype))

    ours = of(torch.float32, F.scaled_dot_product_attention)
    assert len(active) == 1
    for actual, eager, truth in zip(ours, of(torch.float32, reference), of(torch.float64, reference), strict=True):
        assert_composite(actual, eager, truth, floor=32 * eps(torch.float32) * truth.abs().max().item())


def test_inference_mode_and_taking_back(device, active):
    (q, k, v), options = CALLS["bias"](device)
    with torch.inference_mode():
        inside = torch.randn_like(q)
        F.scaled_dot_product_attention(inside, k, v, **options)
        F.scaled_dot_product_attention(inside, inside, inside, options["attn_mask"][..., :19])
    assert len(active) == 2
    torch.nn.attention.restore_flash_attention_impl()
    F.scaled_dot_product_attention(q, k, v, **options)
    assert len(active) == 2


def test_who_asks_for_another_kernel_gets_it(device, active):
    (q, k, v), options = CALLS["bias"](device)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, **options)
    assert_lossy(out, reference(q, k, v, **options), min_sqnr_db=MIN_SQNR_DB)
    assert active == []


def test_errors_and_torch_func_stay_torchs(device, active):
    (q, k, v), options = CALLS["bias"](device)
    with pytest.raises(RuntimeError, match="dtype"):
        F.scaled_dot_product_attention(q, k.double(), v, **options)
    torch.func.grad(lambda x: F.scaled_dot_product_attention(x, k, v, **options).sum())(q)
    assert active == []


@pytest.mark.skipif(not ON_GPU, reason="the choice of a flash kernel is made for tensors of a GPU")
def test_flash_stays_torchs(device, active):
    q, k, v = (t.bfloat16() for t in heads(device, 2, 2, 2, queries=37))
    F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert active == []


class Masked(nn.Module):
    """A model that calls torch's function with a mask."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x, keep):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])


def padding(device: str) -> torch.Tensor:
    """True where a token is."""
    return torch.arange(21, device=device) < torch.tensor([[21], [9]], device=device)


def rewritten(model: nn.Module) -> nn.Module:
    ours = copy.deepcopy(model)
    assert lamina.swap_(ours, lamina.FusedAttention()).swapped
    return ours


def test_calls_of_a_models_own_modules(device):
    model = nn.ModuleDict({"inner": Masked()}).eval().to(device)
    x = torch.randn(2, 21, 32, device=device)
    with torch.no_grad():
        ours, theirs = (m["inner"](x, padding(device)) for m in (rewritten(model), model))
    assert_lossy(ours, theirs, min_sqnr_db=MIN_SQNR_DB)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_torchs_layers(kind, device):
    x, keep = torch.randn(2, 21, 32, device=device), padding(device)
    left_out = ~keep
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
        call = {"src_key_padding_mask": left_out}
        inputs = (x,)
    else:
        layer = nn.TransformerDecoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
        causal = nn.Transformer.generate_square_subsequent_mask(21, device=device)
        call = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": left_out}
        inputs = x, torch.randn_like(x)
    model = nn.ModuleDict({"layer": layer}).to(device).train()  # torch's fast path is for evaluation
    with torch.no_grad():
        ours, theirs = (m["layer"](*inputs, **call) for m in (rewritten(model), model))
    assert_lossy(ours[keep], theirs[keep], min_sqnr_db=MIN_SQNR_DB)


def test_transformers(device):
    transformers = pytest.importorskip("transformers", reason="pip install lamina[models]")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**sizes, intermediate_size=64, vocab_size=60, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config).eval().to(device)
    model.set_attn_implementation("sdpa")
    keep = padding(device)
    tokens = torch.randint(1, 60, (2, 21), device=device)
    with torch.no_grad():
        ours, theirs = (m(tokens, attention_mask=keep.long())[0] for m in (rewritten(model), model))
    assert_lossy(ours[keep], theirs[keep], min_sqnr_db=MIN_SQNR_DB)
