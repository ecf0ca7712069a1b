"""Drop-in recurrent layers: nn.LSTM, nn.GRU and nn.RNN as one compiled call over all layers, directions and steps, and
their cells.

They are siblings of the torch classes, subclasses of nn.RNNBase: torch.compile refuses every nn.LSTM, nn.GRU and nn.RNN
and breaks the graph there, subclasses included, while an op of lamina is one node of it.
"""

import weakref
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lamina import ops
from lamina.quant.weights import dequantize_weight, quantize_weight


def arguments_of(module: nn.RNNBase) -> dict[str, Any]:
    """What the constructor of a recurrent layer like `module` takes, beside dtype and device."""
    names = "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"
    arguments = {name: getattr(module, name) for name in names}
    if module.proj_size:  # which nn.GRU does not take
        arguments["proj_size"] = module.proj_size
    if module.mode.startswith("RNN"):
        arguments["nonlinearity"] = module.mode.removeprefix("RNN_").lower()
    return arguments


class _FusedRNN(nn.RNNBase):
    """What LSTM, GRU and RNN share. `_torch` is the torch class it stands for."""

    _torch: ClassVar[type[nn.RNNBase]]

    def __init__(self, *args, **kwargs):
        super().__init__(self._torch.__name__, *args, **kwargs)
        if self.proj_size and self._torch is not nn.LSTM:
            raise ValueError(f"{type(self).__name__}: proj_size is {self.proj_size}, but only an LSTM projects")

    @classmethod
    def from_float(cls, module: nn.RNNBase) -> Self:
        """The layer with the parameters (shared, not copied) and in the mode of a torch layer.

        Raises TypeError if `module` is not exactly the torch class: a subclass may compute something else.
        """
        if type(module) is not cls._torch:
            raise TypeError(
                f"{cls.__name__}.from_float: expected nn.{cls._torch.__name__}, got {type(module).__name__}"
            )
        layer = cls(**arguments_of(module), device="meta")
        for name, parameter in module.named_parameters(recurse=False):
            setattr(layer, name, parameter)
        return layer.train(module.training)

    def forward(self, input: Tensor | PackedSequence, hx=None):
        """As the torch class: input [T, B, I] ([B, T, I] if batch_first), [T, I] or packed -> output, last state(s).

        What torch refuses goes to torch's own forward: its errors are the ones people know.
        """
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        states = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if not self._takes(data, input.batch_sizes if packed else None, states):
            return self._elsewhere(input, hx)
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

    def _elsewhere(self, input: Tensor | PackedSequence, hx):
        return self._torch.forward(self, input, hx)

    def _takes_dtype(self, dtype: torch.dtype) -> bool:
        return dtype == self.weight_ih_l0.dtype

    def _takes(self, data: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...]) -> bool:
        """Whether the op may compute this call."""
        shape = data.shape
        dims = len(shape)
        if dims != 2 and (dims != 3 or batch_sizes is not None):
            return False
        if shape[-1] != self.input_size or not self._takes_dtype(data.dtype):
            return False
        time = 1 if dims == 3 and self.batch_first else 0
        if batch_sizes is None and shape[time] == 0:
            return False
        if not states:
            return True
        if batch_sizes is not None:
            batch = int(batch_sizes[0])
        else:
            batch = shape[1 - time] if dims == 3 else None
        expected = self._state_shapes(batch)
        return len(states) == len(expected) and all(s.shape == e for s, e in zip(states, expected, strict=True))

    def _state_shapes(self, batch: int | None) -> list[tuple[int, ...]]:
        parts = self.num_layers * (2 if self.bidirectional else 1)
        lead = (parts,) if batch is None else (parts, batch)
        return [(*lead, width) for width in self._state_widths()]

    def _options(self, batch_first: bool) -> tuple:
        # Not _flat_weights, which torch.export and functional_call pass by; getattr costs half a microsecond.
        known = self._parameters
        weights = [known[name] if name in known else getattr(self, name) for name in self._flat_weights_names]
        return weights, self.bias, self.num_layers, self.bidirectional, batch_first

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0


class LSTM(_FusedRNN):
    """Drop-in for nn.LSTM: the same arguments, parameters, inputs and outputs, through `lamina.ops.lstm`.

    Every option of nn.LSTM is honoured: layers, directions, projections, batch_first, dropout, initial states, packed
    and unbatched input. The op computes float32 and bfloat16 on the CPU, with a gradient of its own for float32; what
    it leaves to torch it says (`lamina.ops.lstm`); on a GPU that is every call, which cuDNN computes. Each gate is
    within 3e-7 of the exact function of its float32 sum.

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
        output, h_n, c_n = ops.lstm(
            data, states or None, *self._options(batch_first), batch_sizes=batch_sizes, dropout=self._dropout()
        )
        return output, (h_n, c_n)

    @staticmethod
    def _each(change, state):
        return change(state[0]), change(state[1])


class GRU(_FusedRNN):
    """Drop-in for nn.GRU: the same arguments, parameters, inputs and outputs, through `lamina.ops.gru`.

    Every option of nn.GRU is honoured: layers, directions, batch_first, dropout, initial state, packed and unbatched
    input. The op computes float32 and bfloat16 on the CPU, with a gradient of its own for float32; what it leaves to
    torch it says (`lamina.ops.gru`); on a GPU that is every call, which cuDNN computes. Each gate is within 3e-7 of the
    exact function of its float32 sum.

    >>> layer = lamina.nn.GRU.from_float(nn.GRU(40, 256, num_layers=3)).eval()
    >>> output, h_n = layer(torch.randn(160, 1, 40))
    """

    _torch = nn.GRU

    def _state_widths(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def _call(self, data: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...], batch_first: bool):
        state = states[0] if states else None
        options = {"batch_sizes": batch_sizes, "dropout": self._dropout()}
        return ops.gru(data, state, *self._options(batch_first), **options)

    @staticmethod
    def _each(change, state):
        return change(state)


class RNN(_FusedRNN):
    """Drop-in for nn.RNN: the same arguments, parameters, inputs and outputs, through `lamina.ops.rnn_tanh` or
    `rnn_relu`.

    Every option of nn.RNN is honoured: nonlinearity, layers, directions, batch_first, dropout, initial state, packed
    and unbatched input. The op computes float32 and bfloat16 on the CPU, with a gradient of its own for float32; on a
    GPU torch's own (cuDNN) computes.

    >>> layer = lamina.nn.RNN.from_float(nn.RNN(40, 256, nonlinearity="relu")).eval()
    >>> output, h_n = layer(torch.randn(160, 1, 40))
    """

    _torch = nn.RNN
    _OPS: ClassVar[dict[str, Any]] = {"tanh": ops.rnn_tanh, "relu": ops.rnn_relu}

    def __init__(self, *args, **kwargs):
        if len(args) > 3:  # where nn.RNN has it, and its siblings have `bias`
            args, kwargs = (*args[:3], *args[4:]), kwargs | {"nonlinearity": args[3]}
        self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in self._OPS:
            raise ValueError(f"RNN: nonlinearity is {self.nonlinearity!r}, but must be 'tanh' or 'relu'")
        nn.RNNBase.__init__(self, f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)
        if self.proj_size:
            raise ValueError(f"RNN: proj_size is {self.proj_size}, but only an LSTM projects")

    def _state_widths(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def _call(self, data: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...], batch_first: bool):
        options = {"batch_sizes": batch_sizes, "dropout": self._dropout()}
        return self._OPS[self.nonlinearity](data, states[0] if states else None, *self._options(batch_first), **options)

    @staticmethod
    def _each(change, state):
        return change(state)


class _Cell:
    """What the cells share: one step of one layer, as a sequence of one step. `_torch` is the class it stands for."""

    _torch: ClassVar[type[nn.RNNCellBase]]

    @classmethod
    def from_float(cls, module: nn.RNNCellBase) -> Self:
        """The cell with the parameters (shared, not copied) and in the mode of a torch cell.

        Raises TypeError if `module` is not exactly the torch class: a subclass may compute something else.
        """
        if type(module) is not cls._torch:
            raise TypeError(
                f"{cls.__name__}.from_float: expected nn.{cls._torch.__name__}, got {type(module).__name__}"
            )
        names = ("input_size", "hidden_size", "bias", *(("nonlinearity",) if cls._torch is nn.RNNCell else ()))
        cell = cls(**{name: getattr(module, name) for name in names}, device="meta")
        for name, parameter in module.named_parameters(recurse=False):
            setattr(cell, name, parameter)
        return cell.train(module.training)

    def forward(self, input: Tensor, hx=None):
        """As the torch class: input [B, I] or [I] and the state(s) before, zeros if None -> the state(s) after.

        What torch refuses goes to torch's own forward, for its errors.
        """
        states = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
        shape = (*input.shape[:-1], self.hidden_size)
        fits = input.ndim in (1, 2) and input.shape[-1] == self.input_size and all(s.shape == shape for s in states)
        if not fits or input.dtype is not self.weight_ih.dtype or len(states) not in (0, self._states):
            return super().forward(input, hx)
        batched = input.ndim == 2
        x, *states = (t.unsqueeze(0) if batched else t[None, None] for t in (input, *states))
        weights = [w for w in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh) if w is not None]
        after = [s[0] if batched else s[0, 0] for s in self._step(x, tuple(states), weights)]
        return after[0] if len(after) == 1 else tuple(after)


class LSTMCell(_Cell, nn.LSTMCell):
    """Drop-in for nn.LSTMCell through `lamina.ops.lstm`.

    >>> cell = lamina.nn.LSTMCell.from_float(nn.LSTMCell(40, 256)).eval()
    >>> h, c = cell(torch.randn(8, 40))
    """

    _torch = nn.LSTMCell
    _states = 2

    def _step(self, x: Tensor, states: tuple[Tensor, ...], weights: list[Tensor]) -> tuple[Tensor, ...]:
        return ops.lstm(x, states or None, weights, self.bias)[1:]


class GRUCell(_Cell, nn.GRUCell):
    """Drop-in for nn.GRUCell through `lamina.ops.gru`.

    >>> cell = lamina.nn.GRUCell.from_float(nn.GRUCell(40, 256)).eval()
    >>> h = cell(torch.randn(8, 40))
    """

    _torch = nn.GRUCell
    _states = 1

    def _step(self, x: Tensor, states: tuple[Tensor, ...], weights: list[Tensor]) -> tuple[Tensor, ...]:
        return ops.gru(x, states[0] if states else None, weights, self.bias)[1:]


class RNNCell(_Cell, nn.RNNCell):
    """Drop-in for nn.RNNCell through `lamina.ops.rnn_tanh` or `rnn_relu`.

    >>> cell = lamina.nn.RNNCell.from_float(nn.RNNCell(40, 256)).eval()
    >>> h = cell(torch.randn(8, 40))
    """

    _torch = nn.RNNCell
    _states = 1

    def _step(self, x: Tensor, states: tuple[Tensor, ...], weights: list[Tensor]) -> tuple[Tensor, ...]:
        op = {"tanh": ops.rnn_tanh, "relu": ops.rnn_relu}[self.nonlinearity]
        return op(x, states[0] if states else None, weights, self.bias)[1:]


# Of int8 layers on GPUs: what their weights were, and the float layer that was made of them.
_ON_GPU: "weakref.WeakKeyDictionary[nn.Module, tuple[tuple, nn.RNNBase]]" = weakref.WeakKeyDictionary()


class _Int8RNN(_FusedRNN):
    """What Int8LSTM and Int8GRU share: frozen int8 weights under the names of the float ones, each with its scale.

    `_fused` is the float layer of lamina that stands for the same torch class.
    """

    _fused: ClassVar[type[_FusedRNN]]

    def __init__(self, *args, **kwargs):
        self._set(self._torch(*args, **kwargs))

    @classmethod
    def from_float(cls, module: nn.RNNBase) -> Self:
        """The int8 layer with the quantized weights of a torch layer, in its mode.

        Raises TypeError if `module` is not exactly the torch class, ValueError if a weight has NaN or infinity.
        """
        if type(module) is not cls._torch:
            raise TypeError(
                f"{cls.__name__}.from_float: expected nn.{cls._torch.__name__}, got {type(module).__name__}"
            )
        layer = cls.__new__(cls)
        layer._set(module)
        return layer.train(module.training)

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Whether a layer of this class may take `module`'s place: torch's, lamina's fused one, or one like itself."""
        return type(module) in (cls._torch, cls._fused, cls)

    def options(self) -> dict[str, Any]:
        """The constructor's arguments beside those the place gives (`arguments_of`), for `lamina.save`: none."""
        return {}

    def _set(self, module: nn.RNNBase) -> None:
        super().__init__(**arguments_of(module), device="meta")
        for name, weight in module.named_parameters(recurse=False):
            weight = weight.detach()
            delattr(self, name)
            if weight.ndim == 1:
                self.register_buffer(name, weight.to(torch.float32, copy=True))
                continue
            codes, scale = quantize_weight(weight)
            self.register_buffer(name, codes)
            self.register_buffer(f"{name}_scale", scale)
        self._init_flat_weights()

    def quantized_weights(self) -> list[Tensor]:
        """The flat list of the weights, as `lamina.ops.int8_lstm` and `int8_gru` take it."""
        return [getattr(self, name) for name in self._flat_weights_names]

    def scales(self) -> list[Tensor]:
        """The scales of the matrices among them, in their order."""
        return [getattr(self, f"{name}_scale") for name in self._flat_weights_names if name.startswith("weight")]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> nn.RNNBase:
        """The torch layer with the weights this one computes with; they do not train."""
        layer = self._torch(**arguments_of(self), device="meta")
        for name in self._flat_weights_names:
            weight = getattr(self, name)
            if weight.dtype is torch.int8:
                weight = dequantize_weight(weight, getattr(self, f"{name}_scale"))
            setattr(layer, name, nn.Parameter(weight.to(dtype), requires_grad=False))
        return layer.train(self.training)

    def _elsewhere(self, input: Tensor | PackedSequence, hx):
        """Training (dropout, the straight-through gradient), GPUs, and inputs that torch refuses in its own words."""
        dtype = input.data.dtype
        dtype = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
        if not self.weight_ih_l0.is_cuda:
            return self.dequantized(dtype)(input, hx)
        return self._on_gpu(dtype)(input, hx)

    def _on_gpu(self, dtype: torch.dtype) -> nn.RNNBase:
        """The layer that cuDNN runs, kept until a weight changes: with weights in one piece of memory, as it wants."""
        # Beside the layer, not in it: no state_dict, copy or file shall hold the floats.
        stamp = dtype, self.training, [(t.data_ptr(), t._version) for t in self._buffers.values()]
        known = _ON_GPU.get(self)
        if known is None or known[0] != stamp:
            layer = self.dequantized(dtype)
            layer.flatten_parameters()
            known = _ON_GPU[self] = stamp, layer
        return known[1]

    def _takes_dtype(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.float32, torch.bfloat16)

    def _takes(self, data: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...]) -> bool:
        needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (data, *states))
        plain = all(t.is_cpu and t.dtype == data.dtype for t in (data, *states))
        plain = plain and not needs_gradient and not (self.training and self.dropout > 0.0)
        return plain and super()._takes(data, batch_sizes, states)

    def _options(self, batch_first: bool) -> tuple:
        how = (self.bias, self.num_layers, self.bidirectional, batch_first)
        return self.quantized_weights(), self.scales(), *how

    def _init_flat_weights(self) -> None:
        # torch calls this after every .to(): scales and biases stay float32, or gates would lose three digits.
        for name, buffer in self._buffers.items():
            if buffer.is_floating_point() and buffer.dtype is not torch.float32:
                self._buffers[name] = buffer.float()
        super()._init_flat_weights()

    def check_saved(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """ValueError says why the matrices of this layer in a state_dict do not fit it."""
        self._quantized(state, prefix)

    def _quantized(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """`state` with its float matrices of this layer quantized. ValueError names one that is not valid."""
        state = dict(state)
        for key in (prefix + name for name in self._flat_weights_names if name.startswith("weight")):
            weight, scale = state.get(key), state.get(f"{key}_scale")
            if weight is None:
                continue
            if weight.is_floating_point():
                try:
                    state[key], state[f"{key}_scale"] = quantize_weight(weight)
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from None
            elif weight.dtype is not torch.int8:
                raise ValueError(f"{key} is {weight.dtype}, but must be floating point or torch.int8")
            elif scale is None:
                raise ValueError(f"{key} is int8 and needs {key}_scale")
            elif (weight == -128).any():
                raise ValueError(f"{key} has a code of -128, but codes are in [-127, 127]")
            elif not (torch.isfinite(scale) & (scale > 0)).all():
                raise ValueError(f"{key}_scale must be positive and finite")
        return state

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """A float matrix, such as one of the original model, is quantized on the way in."""
        try:
            own = self._quantized(state_dict, prefix)
        except ValueError as error:
            errors.append(str(error))
            return
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing, unexpected, errors)


class Int8LSTM(_Int8RNN):
    """nn.LSTM with frozen int8 weights, through `lamina.ops.int8_lstm`: the same arguments, inputs and outputs.

    Every matrix has one scale per row; each row of the input, and of the state at every step, is quantized on the fly;
    sums are exact, biases, gates and cells float32. The state_dict has the names of nn.LSTM, int8, and `<name>_scale`
    for each matrix; a float state_dict is quantized when it is loaded. Where gradients are asked for, and on a GPU
    (cuDNN), torch's layer with the dequantized weights computes: the gradient for the input is the straight-through
    one, the weights do not train.

    >>> layer = lamina.nn.Int8LSTM.from_float(nn.LSTM(40, 256, num_layers=3)).eval()
    >>> output, (h_n, c_n) = layer(torch.randn(160, 1, 40))
    """

    _torch = nn.LSTM
    _fused = LSTM
    _state_widths = LSTM._state_widths
    _each = staticmethod(LSTM._each)

    def _call(self, data: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...], batch_first: bool):
        output, h_n, c_n = ops.int8_lstm(data, states or None, *self._options(batch_first), batch_sizes=batch_sizes)
        return output, (h_n, c_n)


class Int8GRU(_Int8RNN):
    """nn.GRU with frozen int8 weights, through `lamina.ops.int8_gru`: the same arguments, inputs and outputs.

    Every matrix has one scale per row; each row of the input, and of the state at every step, is quantized on the fly;
    sums are exact, biases, gates and states float32. The state_dict has the names of nn.GRU, int8, and `<name>_scale`
    for each matrix; a float state_dict is quantized when it is loaded. Where gradients are asked for, and on a GPU
    (cuDNN), torch's layer with the dequantized weights computes: the gradient for the input is the straight-through
    one, the weights do not train.

    >>> layer = lamina.nn.Int8GRU.from_float(nn.GRU(40, 256, num_layers=3)).eval()
    >>> output, h_n = layer(torch.randn(160, 1, 40))
    """

    _torch = nn.GRU
    _fused = GRU
    _state_widths = GRU._state_widths
    _each = staticmethod(GRU._each)

    def _call(self, data: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...], batch_first: bool):
        state = states[0] if states else None
        return ops.int8_gru(data, state, *self._options(batch_first), batch_sizes=batch_sizes)
