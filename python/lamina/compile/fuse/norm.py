"""Layer norm and RMS norm: the sum in front of a norm joins it, and RMS norms that models spell out get their name.

Llama and T5 write x * rsqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467) as six calls, in
float32 between two casts where the model is bfloat16.
"""

import torch
import torch.nn.functional as F
from torch import fx

from lamina.compile import choose
from lamina.compile.capture import Captured, fake, is_tensor, kind, number, operands, strip_casts, sum_of

_LAYER_NORM = torch.ops.lamina.layer_norm
_RMS_NORM = torch.ops.lamina.rms_norm


def rms_norms(captured: Captured) -> None:
    for root in captured.nodes("mul"):
        found = _spelled_out(captured, root)
        if found is None:
            continue
        x, weight, eps, inner = found
        if captured.private(inner, root) and captured.movable(inner, root):
            new = captured.call(F.rms_norm, (x, tuple(fake(weight).shape), weight, eps), at=root)
            captured.replace(root, new, "rms_norm spelled out")


def _spelled_out(captured: Captured, root: fx.Node) -> tuple[fx.Node, fx.Node, float, list[fx.Node]] | None:
    values = operands(root)
    for weight, scaled in ((values["input"], values["other"]), (values["other"], values["input"])):
        if captured.constant(weight) is None or fake(weight).ndim != 1 or not is_tensor(scaled):
            continue
        inner: list[fx.Node] = []
        scaled = strip_casts(scaled, inner)
        if kind(scaled) != "mul":
            continue
        inner.append(scaled)
        parts = operands(scaled)
        for x, inverse in ((parts["input"], parts["other"]), (parts["other"], parts["input"])):
            if not is_tensor(x) or kind(inverse) != "rsqrt":
                continue
            chain = [*inner, inverse]
            found = _mean_square(inverse.args[0], chain)
            if found is None:
                continue
            squared, eps = found
            source = strip_casts(x, chain)
            fits = source is strip_casts(squared, chain) and fake(source).dtype == fake(root).dtype
            if fits and fake(weight).dtype == fake(root).dtype and fake(source).shape[-1] == fake(weight).shape[0]:
                return source, weight, eps, list(dict.fromkeys(chain))
    return None


def _mean_square(node: fx.Node, chain: list[fx.Node]) -> tuple[fx.Node, float] | None:
    """(x, eps) of mean(x^2, -1, keepdim=True) + eps."""
    if kind(node) != "add":
        return None
    values = operands(node)
    eps = number(values["other"])
    mean = values["input"]
    if eps is None or kind(mean) != "mean":
        return None
    values = operands(mean)
    if values["keepdim"] is not True or values["dim"] not in (-1, [-1], (-1,)):
        return None
    square = values["input"]
    if (kind(square) == "pow" and number(operands(square)["exponent"]) == 2.0) or kind(square) == "square":
        chain.extend((node, mean, square))
        return square.args[0], eps
    if kind(square) == "mul" and square.args[0] is square.args[1]:
        chain.extend((node, mean, square))
        return square.args[0], eps
    return None


def norms(captured: Captured) -> None:
    """Runs after the linear layers took the sums they can take."""
    for node in captured.nodes("layer_norm", "rms_norm"):
        _route(captured, node)


def _route(captured: Captured, node: fx.Node) -> None:
    name, values = kind(node), operands(node)
    ours, torchs = (_LAYER_NORM, F.layer_norm) if name == "layer_norm" else (_RMS_NORM, F.rms_norm)
    x = values.pop("input")
    shape = tuple(values.pop("normalized_shape"))
    rest = (shape, *values.values())
    if not is_tensor(x) or not all(isinstance(size, int) for size in shape):
        captured.left[node] = "its sizes are not fixed"
        return
    parameters = [t for t in rest if isinstance(t, fx.Node)]
    dtypes = {fake(t).dtype for t in (x, *parameters)}
    if (
        not dtypes <= {torch.float32, torch.bfloat16}
        or fake(x).dtype != fake(node).dtype
        or fake(x).device.type != "cpu"
    ):
        captured.left[node] = "lamina's norms are of float32 and bfloat16 on the CPU"
        return
    terms = sum_of(x)
    # The fused call stands where the sum stood, since others may use the sum before the norm runs.
    if terms is not None and not (captured.movable((node,), x) and all(p.op == "placeholder" for p in parameters)):
        terms = None
    keeps_sum = terms is not None and len(x.users) > 1
    if terms is None:
        op, args, pattern = ours.default, (x, *rest, None), name
    elif keeps_sum:
        op, args, pattern = ours.with_sum, (terms[0], *rest, terms[1]), f"add + {name}, sum kept"
    else:
        op, args, pattern = ours.default, (terms[0], *rest, terms[1]), f"add + {name}"
    if captured.measure:
        given = choose.random_like(args)
        added = (lambda: given[0]) if terms is None else (lambda: given[0] + given[-1])
        candidates = {"torch": lambda: torchs(added(), *given[1:-1]), "lamina": lambda: op(*given)}
        if choose.fastest((name, keeps_sum, choose.describe(args)), candidates) == "torch":
            captured.left[node] = "torch's own is as fast at this shape"
            return
    new = captured.call(op, args, at=node if terms is None else x)
    if keeps_sum:
        total = captured.take(new, 1, at=x)
        new = captured.take(new, 0, at=x)
        x.replace_all_uses_with(total)
    captured.replace(node, new, pattern)
    captured.erase(x)
