"""Activations that models spell out, given their one name again.

GPT-2's GELU is eight elementwise calls over the widest tensor of the model (Hendrycks and Gimpel 2016,
arXiv:1606.08415, the tanh form); SiLU is sometimes x * sigmoid(x), and CLIP's GELU x * sigmoid(1.702 x).
"""

import torch.nn.functional as F

from lamina.compile.capture import Captured, fake, is_tensor, match, quick_gelu

_INNER = ("add", 1.0, ("tanh", ("mul", 0.7978845608, ("add", "x", ("mul", 0.044715, ("pow", "x", 3.0))))))
_SPELLINGS = (
    (("mul", ("mul", 0.5, "x"), _INNER), F.gelu, {"approximate": "tanh"}, "gelu_tanh"),
    (("mul", 0.5, ("mul", "x", _INNER)), F.gelu, {"approximate": "tanh"}, "gelu_tanh"),
    (("mul", "x", ("mul", 0.5, _INNER)), F.gelu, {"approximate": "tanh"}, "gelu_tanh"),
    (("mul", "x", ("sigmoid", "x")), F.silu, {}, "silu"),
    (("mul", "x", ("sigmoid", ("mul", 1.702, "x"))), quick_gelu, {}, "quick_gelu"),
)


def activations(captured: Captured) -> None:
    for root in captured.nodes("mul"):
        for pattern, function, kwargs, name in _SPELLINGS:
            found = match(pattern, root)
            if found is None or not is_tensor(found["x"]) or fake(found["x"]).dtype != fake(root).dtype:
                continue
            inner = [node for node in found[""] if node is not root]
            if captured.private(inner, root) and captured.movable(inner, root):
                new = captured.call(function, (found["x"],), kwargs, at=root)
                captured.replace(root, new, f"{name} spelled out")
                break
