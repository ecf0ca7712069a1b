"""Drop-in layers. Each mirrors a torch.nn class and is built from one by `from_float`."""

from lamina.nn.attention import (
    MultiheadAttention,
    ScaledDotProductAttention,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from lamina.nn.conv import Conv2d
from lamina.nn.int8_conv import Int8Conv1d, Int8Conv2d, Int8ConvTranspose2d
from lamina.nn.int8_linear import Int8Linear
from lamina.nn.lora_linear import LoRALinear
from lamina.nn.qat_linear import QATLinear
from lamina.nn.rnn import GRU, LSTM, RNN, GRUCell, Int8GRU, Int8LSTM, LSTMCell, RNNCell
from lamina.nn.sparse_conv import SparseConv2d
from lamina.nn.sparse_int8_linear import SparseInt8Linear
from lamina.nn.sparse_linear import SparseLinear
from lamina.nn.weight_only_linear import Int4WeightOnlyLinear, Int8WeightOnlyLinear

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Conv2d",
    "GRUCell",
    "Int4WeightOnlyLinear",
    "Int8Conv1d",
    "Int8Conv2d",
    "Int8ConvTranspose2d",
    "Int8GRU",
    "Int8LSTM",
    "Int8Linear",
    "Int8WeightOnlyLinear",
    "LSTMCell",
    "LoRALinear",
    "MultiheadAttention",
    "QATLinear",
    "RNNCell",
    "ScaledDotProductAttention",
    "SparseConv2d",
    "SparseInt8Linear",
    "SparseLinear",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
