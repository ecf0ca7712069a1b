"""Drop-in recurrent layers: nn.LSTM and nn.GRU as one compiled call over all layers, directions and steps.

They are siblings of the torch classes, subclasses of nn.RNNBase: torch.compile refuses every nn.LSTM, nn.GRU and nn.RNN
and breaks the graph there, subclasses included, while an op of lamina is one node of it.
"""

from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lamina import ops


class _FusedRNN(nn.RNNBase):
    """What LSTM and GRU share. `_torch` is the torch class it stands for."""

    _torch: ClassVar[type[nn.RNNBase]]

    def __init__(self, *args, **kwargs):
        super().__init__(self._torch.__name__, *args, **kwargs)

    @classmethod
    def from_float(cls, module: nn.RNNBase) -> Self:
        """The layer with the parameters (shared, not copied) and in the mode of a torch layer.

        Raises TypeError if `module` is not exactly the torch class: a subclass may compute something else.
        """
        if type(module) is not cls._torch:
            raise TypeError(
                f"{cls.__name__}.from_float: expected nn.{cls._torch.__name__}, got {type(module).__name__}"
            )
        options = {"proj_size": module.proj_size} if module.proj_size else {}
        layer = cls(
            module.input_size,
            module.hidden_size,
            module.num_layers,
            bias=module.bias,
            batch_first=module.batch_first,
            dropout=module.dropout,
            bidirectional=module.bidirectional,
            device="meta",
            **options,
        )
        for name, parameter in module.named_parameters(recurse=False):
            setattr(layer, name, parameter)
        return layer.train(module.training)

    def forward(self, input: Tensor | PackedSequence, hx=None):
        """As the torch class: input [T, B, I] ([B, T, I] if batch_first), [T, I] or packed -> output, last state(s).

        Training and inputs that torch refuses go to torch's own forward: its backward keeps what the op's computes
        again, and its errors are the ones people know.
        """
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        states = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if not self._takes(data, input.batch_sizes if packed else None, states):
            return self._torch.forward(self, input, hx)
        if packed:
            return self._forward_packed(input, states)
        if input.ndim == 3:
            return self._call(input, None, states, self.batch_first)
        # One sequence without a batch: batch_first has no meaning.
        output, last = self._call(input.unsqueeze(1), None, tuple(s.unsqueeze(1) for s in states), False)
        return output.squeeze(1), self._each(lambda state: state.squeeze(1), last)

    def _forward_packed(self, input: PackedSequence, states: tuple[Tensor, ...]):
        data, batch_sizes, order, original_order = input
        if not states:
            states = tuple(data.new_zeros(shape) for shape in self._state_shapes(int(batch_sizes[0])))
        elif order is not None:
            states = tuple(state.index_select(1, order) for state in states)
        output, last = self._call(data, batch_sizes, states, False)
        if original_order is not None:
            last = self._each(lambda state: state.index_select(1, original_order), last)
        return PackedSequence(output, batch_sizes, order, original_order), last

    def _takes(self, data: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...]) -> bool:
        """Whether the op may compute this call."""
        if self.training and (self.dropout > 0.0 or torch.is_grad_enabled()):
            return False
        if data.ndim not in ((2, 3) if batch_sizes is None else (2,)):
            return False
        if data.shape[-1] != self.input_size or data.dtype != self.weight_ih_l0.dtype:
            return False
        if batch_sizes is not None:
            batch = int(batch_sizes[0]) if states else 0
        else:
            time = 1 if self.batch_first and data.ndim == 3 else 0
            if data.shape[time] == 0:
                return False
            batch = None if data.ndim == 2 else data.shape[1 - time]
        expected = self._state_shapes(batch)
        return not states or [tuple(state.shape) for state in states] == expected

    def _state_shapes(self, batch: int | None) -> list[tuple[int, ...]]:
        parts = self.num_layers * (2 if self.bidirectional else 1)
        lead = (parts,) if batch is None else (parts, batch)
        return [(*lead, width) for width in self._state_widths()]

    def _options(self, batch_first: bool) -> tuple:
        weights = [getattr(self, name) for name in self._flat_weights_names]
        return weights, self.bias, self.num_layers, self.bidirectional, batch_first


class LSTM(_FusedRNN):
    """Drop-in for nn.LSTM: the same arguments, parameters, inputs and outputs, through `lamina.ops.lstm`.

    Every option of nn.LSTM is honoured: layers, directions, projections, batch_first, initial states, packed and
    unbatched input. In evaluation the op computes it, float32 or bfloat16 on the CPU, and gives gradients too;
    training, other devices, other dtypes and autocast are torch's own forward. Each gate is within 3e-7 of the exact
    function of its float32 sum.

    >>> layer = lamina.nn.LSTM.from_float(nn.LSTM(40, 256, num_layers=3)).eval()
    >>> output, (h_n, c_n) = layer(torch.randn(160, 1, 40))
    """

    _torch = nn.LSTM

    # nn.LSTM's own, which its forward calls.
    check_forward_args = nn.LSTM.check_forward_args
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    permute_hidden = nn.LSTM.permute_hidden

    def _state_widths(self) -> tuple[int, ...]:
        return self.proj_size or self.hidden_size, self.hidden_size

    def _call(self, data: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...], batch_first: bool):
        output, h_n, c_n = ops.lstm(data, states or None, *self._options(batch_first), batch_sizes=batch_sizes)
        return output, (h_n, c_n)

    @staticmethod
    def _each(change, state):
        return change(state[0]), change(state[1])


class GRU(_FusedRNN):
    """Drop-in for nn.GRU: the same arguments, parameters, inputs and outputs, through `lamina.ops.gru`.

    Every option of nn.GRU is honoured: layers, directions, batch_first, initial state, packed and unbatched input. In
    evaluation the op computes it, float32 or bfloat16 on the CPU, and gives gradients too; training, other devices,
    other dtypes and autocast are torch's own forward. Each gate is within 3e-7 of the exact function of its float32
    sum.

    >>> layer = lamina.nn.GRU.from_float(nn.GRU(40, 256, num_layers=3)).eval()
    >>> output, h_n = layer(torch.randn(160, 1, 40))
    """

    _torch = nn.GRU

    def _state_widths(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def _call(self, data: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...], batch_first: bool):
        state = states[0] if states else None
        return ops.gru(data, state, *self._options(batch_first), batch_sizes=batch_sizes)

    @staticmethod
    def _each(change, state):
        return change(state)
