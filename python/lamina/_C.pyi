"""The compiled module. Tensors come in through DLPack; functions write into the outputs they are given."""

from collections.abc import Sequence

from torch import Tensor

with_cuda: bool
with_cutlass: bool

def available_isas() -> list[str]: ...
def active_isa() -> str: ...
def force_isa(name: str) -> None: ...
def last_isa() -> str: ...
def poison_workspace(on: bool) -> None: ...
def max_threads() -> int: ...
def skips_dispatcher(arguments: tuple) -> bool: ...
def cuda_devices() -> list[str]: ...
def has_code_cuda(device: int) -> bool: ...
def probe_peak(kind: str, threads: int, seconds: float) -> float: ...
def probe_read_bandwidth(bytes: int, threads: int, seconds: float) -> float: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    out: Tensor,
) -> None: ...
def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    bfloat16_products: bool,
    dropout_p: float,
    seed: int,
    int8_scores: bool,
    out: Tensor,
    lse: Tensor,
) -> None: ...
def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    seed: int,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_mask: Tensor | None,
    grad_slopes: Tensor | None,
    grad_sinks: Tensor | None,
) -> None: ...
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
) -> None: ...
def attention_decode_append(
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None: ...
def attention_decode_append_cuda(
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None: ...
def attention_decode_cuda(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    workspace: Tensor,
) -> None: ...
def attention_decode_workspace_cuda(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
) -> int: ...
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
) -> None: ...
def conv2d(
    input: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Sequence[int],
    activation: str,
    pool: str,
    out: Tensor,
) -> None: ...
def conv2d_pack(weight: Tensor, geometry: Sequence[int], packed: Tensor) -> None: ...
def conv2d_packed_size(out_channels: int, group_inputs: int, geometry: Sequence[int]) -> int: ...
def concatenate(tensors: Sequence[Tensor], dim: int, out: Tensor) -> None: ...
def copy(x: Tensor, out: Tensor) -> None: ...
def elementwise(inputs: Sequence[Tensor], program: Sequence[int], constants: Sequence[float], out: Tensor) -> None: ...
def pool2d(
    x: Tensor,
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    count_include_pad: bool,
    divisor: int,
    out: Tensor,
) -> None: ...
def embedding(indices: Tensor, weight: Tensor, out: Tensor) -> None: ...
def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    out: Tensor,
) -> None: ...
def gru(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    panels: Tensor,
    floats: Tensor,
    layers: int,
    bidirectional: bool,
    output: Tensor,
    h_n: Tensor,
    saved: Tensor | None,
) -> None: ...
def int8_conv2d(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    compensation: Tensor,
    size: list[int],
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    x_scale: Tensor | None,
    out_scale: Tensor | None,
    out: Tensor,
) -> None: ...
def int8_conv2d_pack(weight: Tensor, scale: Tensor, groups: int, data: Tensor, compensation: Tensor) -> None: ...
def int8_conv2d_unpack(data: Tensor, groups: int, weight: Tensor) -> None: ...
def int8_conv2d_packed_size(size: list[int], groups: int) -> int: ...
def int8_conv2d_compensation_size(size: list[int], groups: int) -> int: ...
def int8_pool2d(
    x: Tensor,
    kind: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    count_include_pad: bool,
    divisor: int,
    x_scale: Tensor | None,
    out_scale: Tensor | None,
    out: Tensor,
) -> None: ...
def int8_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    compensation: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    x_scale: Tensor | None,
    out_scale: Tensor | None,
    out: Tensor,
) -> None: ...
def sparse_int8_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    compensation: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    x_scale: Tensor | None,
    out_scale: Tensor | None,
    out: Tensor,
) -> None: ...
def sparse_int8_linear_panels(
    x_codes: Tensor,
    x_scales: Tensor,
    data: Tensor,
    scale: Tensor,
    compensation: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    out: Tensor | None,
    codes: Tensor | None,
    scales: Tensor | None,
) -> None: ...
def sparse_int8_linear_pack(
    weight: Tensor, scale: Tensor, pattern: str, data: Tensor, compensation: Tensor
) -> None: ...
def sparse_int8_linear_unpack(data: Tensor, weight: Tensor) -> None: ...
def sparse_int8_linear_packed_size(weight: Tensor, pattern: str) -> int: ...
def int8_linear_cuda(
    codes: Tensor,
    weight_codes: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_scale: Tensor | None,
    out: Tensor,
) -> None: ...
def int8_linear_fits_cuda(codes: Tensor, weight_codes: Tensor, out: Tensor) -> bool: ...
def int8_linear_pack(weight: Tensor, scale: Tensor, data: Tensor, compensation: Tensor) -> None: ...
def int8_linear_unpack(data: Tensor, weight: Tensor) -> None: ...
def int8_linear_packed_size(n: int, k: int) -> int: ...
def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    out: Tensor,
    sum: Tensor | None,
) -> None: ...
def linear(
    x: Tensor, data: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, out: Tensor
) -> None: ...
def linear_pack(weight: Tensor, data: Tensor) -> None: ...
def linear_unpack(data: Tensor, weight: Tensor) -> None: ...
def layer_norm_panels(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    codes: Tensor | None,
    scales: Tensor | None,
) -> None: ...
def attention_panels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    length: int,
    heads: int,
    scale: float,
    bfloat16_products: bool,
    out: Tensor | None,
    codes: Tensor | None,
    scales: Tensor | None,
) -> None: ...
def rms_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    out: Tensor,
    sum: Tensor | None,
) -> None: ...
def quantize_rows(x: Tensor, scale: Tensor | None, codes: Tensor, scales: Tensor) -> None: ...
def reduce(x: Tensor, dims: Sequence[int], keepdim: bool, how: str, out: Tensor) -> None: ...
def softmax(x: Tensor, dim: int, out: Tensor) -> None: ...
def token_panels(x: Tensor, panels: Tensor) -> None: ...
def token_rows(panels: Tensor, rows: Tensor) -> None: ...
def quantize_panels(panels: Tensor, codes: Tensor, scales: Tensor) -> None: ...
def lstm(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    panels: Tensor,
    floats: Tensor,
    layers: int,
    bidirectional: bool,
    output: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    saved: Tensor | None,
) -> None: ...
def rnn_tanh(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    panels: Tensor,
    floats: Tensor,
    layers: int,
    bidirectional: bool,
    output: Tensor,
    h_n: Tensor,
) -> None: ...
def rnn_relu(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    panels: Tensor,
    floats: Tensor,
    layers: int,
    bidirectional: bool,
    output: Tensor,
    h_n: Tensor,
) -> None: ...
def rnn_backward(
    cell: str,
    batch_sizes: Tensor | None,
    output: Tensor,
    saved: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    d_output: Tensor | None,
    panels: Tensor,
    d_h: Tensor,
    direct: Tensor | None,
    d_c: Tensor | None,
    d_x: Tensor,
    d_of_state: Tensor | None,
) -> None: ...
def sparse_conv2d(
    x: Tensor, data: Tensor, bias: Tensor | None, geometry: Sequence[int], activation: str, out: Tensor
) -> None: ...
def sparse_linear(x: Tensor, data: Tensor, bias: Tensor | None, activation: str, out: Tensor) -> None: ...
def sparse_linear_pack(weight: Tensor, pattern: str, data: Tensor) -> None: ...
def sparse_linear_unpack(data: Tensor, weight: Tensor) -> None: ...
def sparse_linear_packed_size(weight: Tensor, pattern: str) -> int: ...
def sparse_linear_info(data: Tensor) -> tuple[str, str, int, int, int, int]: ...
def weight_fingerprint(weights: list[Tensor]) -> int: ...
def weight_only_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    compensation: Tensor | None,
    bias: Tensor | None,
    group: int,
    activation: str,
    out: Tensor,
) -> None: ...
def weight_only_linear_pack(codes: Tensor, scale: Tensor, group: int, data: Tensor) -> None: ...
def weight_only_linear_unpack(data: Tensor, group: int, codes: Tensor, scale: Tensor) -> None: ...
def weight_only_linear_packed_size(n: int, k: int, group: int) -> int: ...
def int8_gru(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    panels: Tensor,
    floats: Tensor,
    compensation: Tensor,
    layers: int,
    bidirectional: bool,
    output: Tensor,
    h_n: Tensor,
) -> None: ...
def int8_lstm(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    panels: Tensor,
    floats: Tensor,
    compensation: Tensor,
    layers: int,
    bidirectional: bool,
    output: Tensor,
    h_n: Tensor,
    c_n: Tensor,
) -> None: ...

# -- plans

class Operand:
    """A tensor of a step: where it lies in one of the plan's buffers (offset in bytes, strides in elements)."""

    def __init__(self, buffer: int, offset: int, dtype: str, shape: Sequence[int], strides: Sequence[int]) -> None: ...

class ArenaPool: ...

class Guard:
    """Whether arguments are numbers and tensors like those of an example."""

    def __init__(self, examples: Sequence[Tensor | int]) -> None: ...
    def fits(self, arguments: Sequence[Tensor | int]) -> bool: ...

class Plan:
    """Steps (op, arguments) over buffers: the arena, the constants, and the tensors that each run is given."""

    def __init__(
        self,
        pool: ArenaPool,
        sizes: Sequence[int],
        constants: list[Tensor],
        steps: Sequence[tuple[str, Sequence]],
    ) -> None: ...
    def run(self, tensors: Sequence[Tensor]) -> None: ...
    def profile(self, tensors: Sequence[Tensor]) -> list[tuple[float, str]]: ...

class Recorder:
    def open(self) -> None: ...
    def close(self) -> None: ...
    def drain(self) -> list[tuple[str, list]]: ...

class Watch:
    """Whether dicts were changed, or tensors written to or moved, since it was made."""

    def __init__(self, dicts: list[dict], tensors: list[Tensor]) -> None: ...
    def changed(self) -> bool: ...
