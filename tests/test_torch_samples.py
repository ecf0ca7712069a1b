"""The sample inputs that PyTorch tests its own attention with, through lamina's op and layers."""

import copy

import pytest
import torch
from tolerances import assert_composite
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import lamina

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]

NAMES = (
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "Transformer",
)
OP = next(info for info in op_db if info.name == "nn.functional.scaled_dot_product_attention")
MODULES = {name: next(info for info in module_db if info.name == f"nn.{name}") for name in NAMES}


def double(value):
    if isinstance(value, Tensor):
        value = value.detach()
        return value.double() if value.is_floating_point() else value
    return value


def run(function, args, kwargs, parameters=()) -> list[Tensor]:
    """The output and, where it has any, the gradients of all that can have them."""
    torch.manual_seed(0)
    output = function(*args, **kwargs)
    found = [t for t in (output if isinstance(output, tuple) else (output,)) if t is not None]
    if any(t.requires_grad for t in found):
        leaves = [t for t in (*args, *kwargs.values(), *parameters) if isinstance(t, Tensor) and t.requires_grad]
        # No sum of squares: behind a layer norm it is a constant, and its gradient nothing but rounding.
        total = sum((t * torch.arange(t.numel(), dtype=t.dtype).cos().view(t.shape)).sum() for t in found)
        found += [g for g in torch.autograd.grad(total, leaves, allow_unused=True) if g is not None]
    return [t.detach() for t in found]


def judge(
    actual: list[Tensor], eager: list[Tensor], truth: list[Tensor], factor: float = 2.0, largest_score: float = 0.0
) -> None:
    """Roundings of a score, and of a log-sum-exp as large, are relative errors of weights."""
    assert len(actual) == len(eager) == len(truth)
    for ours, theirs, exact in zip(actual, eager, truth, strict=True):
        assert ours.shape == theirs.shape
        largest = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
        floor = (4 + largest_score) * torch.finfo(ours.dtype).eps * max(largest, 1.0)
        assert_composite(ours, theirs, exact, factor=factor, floor=floor)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", sorted(OP.dtypes, key=str), ids=str)
def test_samples_of_the_op(dtype, grad):
    judged = 0
    for sample in OP.sample_inputs("cpu", dtype, requires_grad=grad):
        args, kwargs = (sample.input, *sample.args), sample.kwargs
        ours = run(lamina.ops.attention, args, kwargs)
        theirs = run(F.scaled_dot_product_attention, args, kwargs)
        if kwargs.get("dropout_p"):  # other random numbers
            assert [t.shape for t in ours] == [t.shape for t in theirs]
            continue
        given = [double(a).requires_grad_(a.requires_grad) for a in args]
        named = {
            name: double(v).requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
            for name, v in kwargs.items()
        }
        query, key = given[:2]
        largest = (query.norm(dim=-1).max() * key.norm(dim=-1).max() / query.shape[-1] ** 0.5).item()
        judge(ours, theirs, run(F.scaled_dot_product_attention, given, named), largest_score=largest)
        judged += 1
    assert judged >= 10


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_samples_of_the_layers(name, training):
    info, judged, grad = MODULES[name], 0, training
    for sample in info.module_inputs_func(info, "cpu", torch.float32, grad, training):
        made, given = sample.constructor_input, sample.forward_input
        torch.manual_seed(0)
        theirs: nn.Module = info.module_cls(*made.args, **made.kwargs).train(training)
        ours = copy.deepcopy(theirs)
        assert lamina.swap_(ours, lamina.FusedAttention()).left == ()
        assert type(ours).__module__.startswith("lamina.nn") or name == "Transformer"
        exact = copy.deepcopy(theirs).double()
        args, kwargs = given.args, given.kwargs
        wide = [double(a).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
        named = {
            n: double(v).requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for n, v in kwargs.items()
        }
        with torch.set_grad_enabled(grad):
            found = run(ours, args, kwargs, tuple(ours.parameters()))
            expected = run(theirs, args, kwargs, tuple(theirs.parameters()))
            if any(m.p for m in theirs.modules() if isinstance(m, nn.Dropout)) and training:
                assert [t.shape for t in found] == [t.shape for t in expected]
            else:
                # Many operations of both, and the largest errors of a few dozen numbers.
                judge(found, expected, run(exact, wide, named, tuple(exact.parameters())), factor=8.0)
        judged += 1
    assert judged >= 4
