"""torch's own ops, done by lamina's: what the recorder calls where a graph was left with one of torch's.

LOWERINGS[op](live, *args, **kwargs) gives what torch's op gives, or NotImplemented for arguments that lamina's does not
take: they go on as a call of torch. live(tensor): whether a tensor hangs on an input of the model; the functions are
asked only where one does. Weights that do not are packed here, once for all forms of inputs.
"""

from lamina.plan.lowering import arithmetic, pooling, products, rows  # noqa: F401  (they fill the table)
from lamina.plan.lowering.memory import in_place
from lamina.plan.lowering.table import LOWERINGS, MUTATING

__all__ = ["LOWERINGS", "MUTATING", "in_place"]
