"""The `lamina` operator namespace.

Ops are registered with `torch.library.Library`, not `custom_op`: a call through the dispatcher costs about 3 us instead
of 6 to 13 us. In an ordinary eager call, where the dispatcher would do nothing else, the CPU implementation is called
without it.
"""

import warnings
from collections.abc import Callable, Mapping

import torch

from lamina import _C

LIBRARY = torch.library.Library("lamina", "DEF")

# The CPU implementation of each op: what a compiled graph calls where nothing needs the dispatcher.
CPU_IMPLEMENTATIONS: dict[torch._ops.OpOverload, Callable] = {}

# The CUDA implementations there are, by the name of the op ("attention.with_lse").
CUDA_IMPLEMENTATIONS: dict[str, Callable] = {}


def define(schema: str, *, cpu: Callable, fake: Callable, cuda: Callable | None = None) -> Callable:
    """Define `lamina::<schema>` with its implementations; returns the function to call.

    It takes all arguments of the schema, by position. `cuda` imports `lamina.kernels.<op>` when it is called, not
    before: Triton is not a dependency, and importing lamina must not load it. Without it a tensor on a GPU is refused.

    The name may be that of an overload ("layer_norm.with_sum"): one op, several results.

    >>> int8_linear = define("int8_linear(Tensor x, ...) -> Tensor", cpu=_int8_linear_cpu, fake=_int8_linear_fake)
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"lamina::{name}", fake, lib=LIBRARY)
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.lamina, packet), overload or "default")
    CPU_IMPLEMENTATIONS[op] = cpu
    LIBRARY.impl(name, cuda or _refusal(name), "CUDA")
    if cuda is not None:
        CUDA_IMPLEMENTATIONS[name] = cuda

    def call(*arguments):
        if not torch.compiler.is_compiling() and _C.skips_dispatcher(arguments):
            return cpu(*arguments)
        return op(*arguments)

    return call


def _refusal(name: str) -> Callable:
    def refuse(*arguments):
        raise NotImplementedError(f"{name}: it runs on the CPU, but one of its tensors is on a GPU")

    return refuse


class Override:
    """Kernels in the place of torch's own, `aten::<name>` for a dispatch key each, until `remove()`.

    >>> handle = Override({("relu", "CPU"): lambda x: x.clamp(min=0)})
    """

    def __init__(self, kernels: Mapping[tuple[str, str], Callable]) -> None:
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="(?s).*Overriding a previously registered kernel", category=UserWarning
            )
            for (name, key), kernel in kernels.items():
                self._library.impl(name, kernel, key, allow_override=True)

    def remove(self) -> None:
        self._library._destroy()
