"""Functional ops: torch's signatures where torch has the op, keyword-only extras after them."""

from lamina.ops.attention import attention, attention_panels, why_not_fused
from lamina.ops.attention_backward import AttentionGradients, attention_backward
from lamina.ops.attention_decode import append_to_cache_, attention_decode
from lamina.ops.attention_varlen import attention_varlen
from lamina.ops.concatenate import concatenate
from lamina.ops.conv2d import conv2d
from lamina.ops.copy import copy
from lamina.ops.elementwise import elementwise, elementwise_program
from lamina.ops.embedding import embedding
from lamina.ops.group_norm import group_norm
from lamina.ops.gru import gru
from lamina.ops.int8_conv2d import (
    PackedInt8ConvTransposeWeight,
    PackedInt8ConvWeight,
    int8_conv1d,
    int8_conv2d,
    int8_conv_transpose2d,
    move_int8_conv_weight,
    pack_int8_conv_transpose_weight,
    pack_int8_conv_weight,
    unpack_int8_conv_transpose_weight,
    unpack_int8_conv_weight,
)
from lamina.ops.int8_gru import int8_gru
from lamina.ops.int8_linear import (
    PackedInt8Weight,
    int8_linear,
    move_int8_weight,
    pack_int8_weight,
    unpack_int8_weight,
)
from lamina.ops.int8_lstm import int8_lstm
from lamina.ops.int8_pool2d import int8_adaptive_avg_pool2d, int8_avg_pool2d, int8_max_pool2d, int8_pool2d
from lamina.ops.layer_norm import NormCodes, layer_norm, layer_norm_codes, layer_norm_panels
from lamina.ops.linear import PackedLinearWeight, linear, pack_linear_weight, unpack_linear_weight
from lamina.ops.lstm import lstm
from lamina.ops.pool2d import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    avg_pool1d,
    avg_pool2d,
    max_pool1d,
    max_pool2d,
    pool2d,
)
from lamina.ops.quantize_rows import quantize_rows
from lamina.ops.reduce import reduce
from lamina.ops.rms_norm import rms_norm, rms_norm_codes
from lamina.ops.rnn_relu import rnn_relu
from lamina.ops.rnn_tanh import rnn_tanh
from lamina.ops.softmax import softmax
from lamina.ops.sparse_conv2d import pack_sparse_conv_weight, sparse_conv2d, unpack_sparse_conv_weight
from lamina.ops.sparse_int8_linear import (
    PackedSparseInt8Weight,
    move_sparse_int8_weight,
    pack_sparse_int8_weight,
    sparse_int8_linear,
    sparse_int8_linear_panels,
    unpack_sparse_int8_weight,
)
from lamina.ops.sparse_linear import (
    PackedSparseWeight,
    SparseInfo,
    move_sparse_weight,
    pack_sparse_weight,
    sparse_info,
    sparse_kernel,
    sparse_linear,
    unpack_sparse_weight,
)
from lamina.ops.token_panels import quantize_panels, token_panels, token_rows
from lamina.ops.weight_only_linear import (
    PackedInt4Weight,
    move_int4_weight,
    pack_int4_weight,
    unpack_int4_weight,
    weight_only_linear,
)

__all__ = [
    "AttentionGradients",
    "NormCodes",
    "PackedInt4Weight",
    "PackedInt8ConvTransposeWeight",
    "PackedInt8ConvWeight",
    "PackedInt8Weight",
    "PackedLinearWeight",
    "PackedSparseInt8Weight",
    "PackedSparseWeight",
    "SparseInfo",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "append_to_cache_",
    "attention",
    "attention_backward",
    "attention_decode",
    "attention_panels",
    "attention_varlen",
    "avg_pool1d",
    "avg_pool2d",
    "concatenate",
    "conv2d",
    "copy",
    "elementwise",
    "elementwise_program",
    "embedding",
    "group_norm",
    "gru",
    "int8_adaptive_avg_pool2d",
    "int8_avg_pool2d",
    "int8_conv1d",
    "int8_conv2d",
    "int8_conv_transpose2d",
    "int8_gru",
    "int8_linear",
    "int8_lstm",
    "int8_max_pool2d",
    "int8_pool2d",
    "layer_norm",
    "layer_norm_codes",
    "layer_norm_panels",
    "linear",
    "lstm",
    "max_pool1d",
    "max_pool2d",
    "move_int4_weight",
    "move_int8_conv_weight",
    "move_int8_weight",
    "move_sparse_int8_weight",
    "move_sparse_weight",
    "pack_int4_weight",
    "pack_int8_conv_transpose_weight",
    "pack_int8_conv_weight",
    "pack_int8_weight",
    "pack_linear_weight",
    "pack_sparse_conv_weight",
    "pack_sparse_int8_weight",
    "pack_sparse_weight",
    "pool2d",
    "quantize_panels",
    "quantize_rows",
    "reduce",
    "rms_norm",
    "rms_norm_codes",
    "rnn_relu",
    "rnn_tanh",
    "softmax",
    "sparse_conv2d",
    "sparse_info",
    "sparse_int8_linear",
    "sparse_int8_linear_panels",
    "sparse_kernel",
    "sparse_linear",
    "token_panels",
    "token_rows",
    "unpack_int4_weight",
    "unpack_int8_conv_transpose_weight",
    "unpack_int8_conv_weight",
    "unpack_int8_weight",
    "unpack_linear_weight",
    "unpack_sparse_conv_weight",
    "unpack_sparse_int8_weight",
    "unpack_sparse_weight",
    "weight_only_linear",
    "why_not_fused",
]
