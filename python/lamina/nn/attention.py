"""Drop-in attention layers: torch's Transformer layers with `lamina.ops.attention` inside.

They have the parameters, names and arguments of the torch classes, so that a torch layer becomes one of them by its
class alone (`adopt`) and is itself again afterwards (`release`). Heads are views of the projections: nothing is copied
between a projection and the kernel.
"""

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina import ops
from lamina.nn.int8_linear import Int8Linear
from lamina.nn.packed_linear import PackedLinear
from lamina.ops.attention import drop_in_attention


class ScaledDotProductAttention(nn.Module):
    """softmax(Q K^T / sqrt(D) + mask) V through `lamina.ops.attention`.

    The drop-in for modules of this name and signature, such as `lamina.models.attention.ScaledDotProductAttention`. It
    has no parameters and no buffers.

    Args of forward:
        query: [B, H, L, D]
        key, value: [B, H, S, D]
        attn_mask: broadcastable to [B, H, L, S]; bool (True = keep) or float (added to the scores).
        is_causal: position i takes only j <= i.

    Returns [B, H, L, D] in the inputs' dtype.

    >>> y = lamina.nn.ScaledDotProductAttention()(q, k, v, is_causal=True)
    """

    @classmethod
    def from_float(cls, module: nn.Module) -> "ScaledDotProductAttention":
        """The layer in the mode (training or not) of the one it replaces."""
        return cls().train(module.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return drop_in_attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal)


class _FromFloat:
    """What the three layers share. `_torch` is the torch class each stands for."""

    _torch: ClassVar[type[nn.Module]]

    @classmethod
    def from_float(cls, module: nn.Module) -> Self:
        """The layer with the parameters (shared, not copied), hooks and mode of a torch layer.

        Raises TypeError if `module` is not exactly the torch class: a subclass may compute something else.
        """
        if type(module) is not cls._torch:
            raise TypeError(
                f"{cls.__name__}.from_float: expected nn.{cls._torch.__name__}, got {type(module).__name__}"
            )
        layer = _twin(module)
        for part in layer.modules():
            if type(part) in LAYERS:
                part.__class__ = LAYERS[type(part)]
        return layer


def _twin(module: nn.Module) -> nn.Module:
    """Another module over the same parameters and buffers; what is set on one is not seen by the other."""
    twin = module.__class__.__new__(module.__class__)
    vars(twin).update({name: v.copy() if isinstance(v, dict | set) else v for name, v in vars(module).items()})
    for name, child in twin._modules.items():
        if child is not None:
            twin._modules[name] = _twin(child)
    return twin


class MultiheadAttention(_FromFloat, nn.MultiheadAttention):
    """Drop-in for nn.MultiheadAttention: the same arguments, parameters, inputs and outputs.

    Every argument is honoured: batch_first, kdim and vdim, add_bias_kv, add_zero_attn, dropout, bias, both masks,
    is_causal, need_weights and average_attn_weights; unbatched and, for self-attention, nested input, also in training.
    With `need_weights=True`, torch's default, the weights have to be computed as a whole; False is much faster. A query
    whose keys are all masked gives zeros, where torch gives NaN if it needs the weights.

    The projections can be quantized (`lamina.swap_(model, lamina.Int8Dynamic())`): then `in_proj` is a layer of lamina,
    which holds what in_proj_weight and in_proj_bias were, and a state_dict of the float layer still loads.

    >>> layer = lamina.nn.MultiheadAttention(512, 8, batch_first=True)
    >>> y, _ = layer(x, x, x, need_weights=False)
    """

    _torch = nn.MultiheadAttention

    @property
    def in_proj_weight(self) -> Tensor | None:
        """[3 * embed_dim, embed_dim]; dequantized where it is used if `in_proj` is a layer, None with kdim or vdim."""
        return self._of_in_proj("weight")

    @property
    def in_proj_bias(self) -> Tensor | None:
        return self._of_in_proj("bias")

    def _of_in_proj(self, name: str) -> Tensor | None:
        if "in_proj" in self._modules:
            return getattr(self._modules["in_proj"], name)
        try:
            return self._parameters[f"in_proj_{name}"]
        except KeyError:  # while it is being built
            raise AttributeError(f"{type(self).__name__} has no in_proj_{name}") from None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's. What does not fit goes to torch's forward: its errors are the ones people know."""
        if query.is_nested and query is key and key is value and key_padding_mask is None and attn_mask is None:
            return self._forward_nested(query, need_weights, average_attn_weights)
        if not self._takes(query, key, value, key_padding_mask, attn_mask, is_causal):
            return nn.MultiheadAttention.forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched, batch_first = query.dim() == 3, self.batch_first
        if not batched:
            batch_first = True
            same, shared = query is key, key is value
            query = query.unsqueeze(0)
            key = query if same else key.unsqueeze(0)
            value = key if shared else value.unsqueeze(0)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v = (self._heads(x, batch_first) for x in self._project(query, key, value))
        # As in torch: is_causal is a hint that attn_mask is the causal mask.
        causal = is_causal and key_padding_mask is None and not need_weights
        if self.bias_k is not None or self.add_zero_attn:
            k, v, attn_mask, key_padding_mask = self._with_more_keys(k, v, attn_mask, key_padding_mask)
            causal = False
        mask = _merged(None if causal else attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = F.dropout(_weights(q, k, mask), dropout)
            heads = weights @ v
            if average_attn_weights:
                weights = weights.mean(1)
            if not batched:
                weights = weights.squeeze(0)
        else:
            heads = drop_in_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        heads = heads.transpose(1, 2) if batch_first else heads.permute(2, 0, 1, 3)
        output = self.out_proj(heads.flatten(2))
        return output if batched else output.squeeze(0), weights

    def _takes(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether shapes and dtypes are as documented."""
        dims = query.dim()
        if dims not in (2, 3) or key.dim() != dims or value.dim() != dims or (is_causal and attn_mask is None):
            return False
        if query.is_nested or key.is_nested or value.is_nested or key.shape[:-1] != value.shape[:-1]:
            return False
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != (self.embed_dim, self.kdim, self.vdim):
            return False
        time = 1 if dims == 3 and self.batch_first else 0
        target, source = query.shape[time], key.shape[time]
        batch = () if dims == 2 else (query.shape[1 - time],)
        if dims == 3 and key.shape[1 - time] != batch[0]:
            return False
        if key_padding_mask is not None and (
            key_padding_mask.shape != (*batch, source) or not _is_mask(key_padding_mask)
        ):
            return False
        if attn_mask is None:
            return True
        heads = self.num_heads * (batch[0] if batch else 1)
        return attn_mask.shape in ((target, source), (heads, target, source)) and _is_mask(attn_mask)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """[..., features] each -> [..., embed_dim] each, in as few products as there are inputs."""
        if not self._qkv_same_embed_dim:
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            return tuple(map(F.linear, (query, key, value), weights, biases))
        if query is key and key is value:
            return self._product(query, 0, 3).chunk(3, -1)
        if key is value:
            return self._product(query, 0, 1), *self._product(key, 1, 3).chunk(2, -1)
        return self._product(query, 0, 1), self._product(key, 1, 2), self._product(value, 2, 3)

    def _product(self, x: Tensor, first: int, last: int) -> Tensor:
        """x [..., E] times the thirds of in_proj from `first` to before `last`."""
        rows = slice(first * self.embed_dim, last * self.embed_dim)
        if "in_proj" in self._modules:
            return self.in_proj(x) if last - first == 3 else self.in_proj.part(x, rows)
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if last - first < 3:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        return F.linear(x, weight, bias)

    def _heads(self, x: Tensor, batch_first: bool) -> Tensor:
        """[B, L, E], or [L, B, E] -> [B, H, L, D], a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    def _with_more_keys(
        self, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The learned key and value of add_bias_kv and the zeros of add_zero_attn behind the others, never masked."""
        shape = k.shape[0], self.num_heads, 1, self.head_dim
        keys, values = [k], [v]
        if self.bias_k is not None:
            keys.append(self.bias_k.view(1, *shape[1:]).to(k.dtype).expand(shape))
            values.append(self.bias_v.view(1, *shape[1:]).to(v.dtype).expand(shape))
        if self.add_zero_attn:
            keys.append(k.new_zeros(shape))
            values.append(v.new_zeros(shape))
        masks = (m if m is None else F.pad(m, (0, len(keys) - 1)) for m in (attn_mask, key_padding_mask))
        return torch.cat(keys, 2), torch.cat(values, 2), *masks

    def _forward_nested(
        self, nested: Tensor, need_weights: bool, average_attn_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of sequences of different lengths; the batch is first, whatever batch_first says."""
        rows, lengths = rows_of(nested)
        kept = torch.arange(int(lengths.max()), device=rows.device) < lengths[:, None]  # [B, S]
        where = kept.flatten().nonzero().squeeze(1)

        def spread(x: Tensor) -> Tensor:  # [T, E] -> [B, S, E], zeros where there is no row
            return x.new_zeros(kept.numel(), x.shape[-1]).index_copy(0, where, x).unflatten(0, kept.shape)

        if self._qkv_same_embed_dim:
            parts = spread(self._product(rows, 0, 3)).chunk(3, -1)
        else:
            parts = map(spread, self._project(rows, rows, rows))
        q, k, v = (self._heads(x, True) for x in parts)
        dropout = self.dropout if self.training else 0.0
        mask, weights = kept[:, None, None, :], None
        if need_weights:
            weights = F.dropout(_weights(q, k, mask), dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = ops.attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        heads = heads.transpose(1, 2).reshape(kept.numel(), self.embed_dim).index_select(0, where)
        return nest(self.out_proj(heads), nested), weights

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        if "in_proj" in self._modules:  # which quantizes what a float state_dict has
            for name in ("weight", "bias"):
                if f"{prefix}in_proj_{name}" in state_dict:
                    state_dict[f"{prefix}in_proj.{name}"] = state_dict.pop(f"{prefix}in_proj_{name}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


def _is_mask(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or mask.is_floating_point()


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """One mask as `ops.attention` takes it, broadcastable to [B, H, L, S], of nn.MultiheadAttention's two.

    There True means to leave a key out; float masks are added to the scores.
    """
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, query.shape[:2])
    masks = [attn_mask, None if key_padding_mask is None else key_padding_mask.unsqueeze(1).unsqueeze(1)]
    masks = [mask for mask in masks if mask is not None]
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        left_out = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return left_out.logical_not()
    return sum(additive(mask, query.dtype) for mask in masks[1:]) + additive(masks[0], query.dtype)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of nn.MultiheadAttention as one to be added to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """The softmax weights [B, H, L, S] as a whole; zeros for a query without keys."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)


def rows_of(nested: Tensor) -> tuple[Tensor, Tensor]:
    """The rows [T, E] of all sequences of a nested tensor, one behind the other, and the lengths [B]."""
    if nested.layout == torch.jagged:
        return nested.values(), nested.offsets().diff()
    sizes = nested._nested_tensor_size()
    if torch.is_grad_enabled() and nested.requires_grad:  # its values() have no gradient
        return torch.cat(nested.unbind()), sizes[:, 0]
    return nested.contiguous().values().view(-1, int(sizes[0, 1])), sizes[:, 0]


def nest(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse, with the lengths and the layout of `like`."""
    if like.layout == torch.jagged:  # with its very offsets, or the two could not be added
        return torch.nested.nested_tensor_from_jagged(rows, like.offsets())
    lengths = like._nested_tensor_size()[:, 0].tolist()
    return torch.nested.as_nested_tensor(list(rows.split(lengths)))


def _fuses(norm: nn.Module) -> bool:
    """Whether a norm may be computed with the sum before it: nobody else looks at it."""
    plain = type(norm) is nn.LayerNorm and not norm._forward_hooks and not norm._forward_pre_hooks
    return plain and not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda")


def _norm_of_sum(norm: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    if not _fuses(norm):
        return norm(residual + x)
    return ops.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, residual=residual)


def _norm_and_sum(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    if not _fuses(norm):
        x = residual + x
        return norm(x), x
    shape = norm.normalized_shape
    return ops.layer_norm(x, shape, norm.weight, norm.bias, norm.eps, residual=residual, return_sum=True)


class _FeedForward:
    """What the two layers share: the activation without memory of its own where nobody else looks at its input."""

    def _ff_block(self, x: Tensor) -> Tensor:
        first, (name, in_place) = self.linear1, _KNOWN.get(self.activation, (None, None))
        if name is None or not isinstance(first, nn.Linear) or first._forward_hooks:
            return super()._ff_block(x)
        if type(first) is Int8Linear and first.activation is None and not first._forward_pre_hooks:
            x = first.activated(x, name)
        else:
            x = first(x)
            x = self.activation(x) if x.requires_grad else in_place(x)
        last = self.dropout2 if isinstance(self, nn.TransformerEncoderLayer) else self.dropout3
        return last(self.linear2(self.dropout(x)))


# Activations that int8_linear computes on the way out, and that torch can compute in place.
_KNOWN = {F.relu: ("relu", torch.ops.aten.relu_), F.gelu: ("gelu", torch.ops.aten.gelu_)}


class TransformerEncoderLayer(_FeedForward, _FromFloat, nn.TransformerEncoderLayer):
    """Drop-in for nn.TransformerEncoderLayer: the same arguments, parameters, inputs and outputs.

    Every option is honoured, nested input and any callable as activation too. Boolean masks stay boolean, so that what
    stands in the padding, NaN included, reaches no other position. Works in nn.TransformerEncoder and nn.Transformer;
    torch's own fast path in C++ is never taken.

    >>> layer = lamina.nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True)
    >>> encoder = nn.TransformerEncoder(layer, num_layers=12)
    """

    _torch = nn.TransformerEncoderLayer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As torch's: [L, B, E] ([B, L, E] if batch_first), [L, E] or nested -> the same."""
        if src.is_nested:
            return self._forward_nested(src, src_mask, src_key_padding_mask)
        if self.norm_first:
            x = self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            y, x = _norm_and_sum(self.norm2, x, src)
            return x + self._ff_block(y)
        x = _norm_of_sum(self.norm1, self._sa_block(src, src_mask, src_key_padding_mask, is_causal), src)
        return _norm_of_sum(self.norm2, self._ff_block(x), x)

    def _forward_nested(self, src: Tensor, src_mask: Tensor | None, src_key_padding_mask: Tensor | None) -> Tensor:
        """The rows of all sequences at once; only attention needs to know where each begins."""

        def attended(rows: Tensor) -> Tensor:
            return rows_of(self._sa_block(nest(rows, src), src_mask, src_key_padding_mask))[0]

        x, _ = rows_of(src)
        if self.norm_first:
            y, x = _norm_and_sum(self.norm2, attended(self.norm1(x)), x)
            return nest(x + self._ff_block(y), src)
        x = _norm_of_sum(self.norm1, attended(x), x)
        return nest(_norm_of_sum(self.norm2, self._ff_block(x), x), src)


class TransformerEncoder(_FromFloat, nn.TransformerEncoder):
    """Drop-in for nn.TransformerEncoder: the same arguments, parameters, inputs and outputs.

    In evaluation padding at the end of sequences is left out of the computation, by nested tensors, and comes out as
    zeros, under the conditions of torch's class; but for layers with quantized weights too.

    >>> encoder = lamina.nn.TransformerEncoder(lamina.nn.TransformerEncoderLayer(768, 12, batch_first=True), 12)
    >>> y = encoder(x, src_key_padding_mask=padding)
    """

    _torch = nn.TransformerEncoder

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As torch's."""
        nested = self._nests(src, mask, src_key_padding_mask)
        x, padding = src, src_key_padding_mask
        if nested:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that nested tensors are a prototype, which torch's class warns of too
                x = torch._nested_tensor_from_mask(src, ~_excluded(src_key_padding_mask), mask_check=False)
            padding = None
        if is_causal is None:
            is_causal = mask is not None and _is_causal(mask)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=is_causal, src_key_padding_mask=padding)
        if nested:
            x = x.to_padded_tensor(0.0, src.shape)
        return x if self.norm is None else self.norm(x)

    def _nests(self, src: Tensor, mask: Tensor | None, padding: Tensor | None) -> bool:
        """Whether padding is left out: where torch's class would do it if no weight were quantized."""
        first = self.layers[0]
        if padding is None or mask is not None or src.dim() != 3 or src.is_nested or first.training:
            return False
        if not self.use_nested_tensor or not torch.backends.mha.get_fastpath_enabled() or torch.is_autocast_enabled():
            return False
        if torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in first.parameters())):
            return False
        if not self.mask_check:
            return True
        # The check reads the mask, which no graph can.
        return not torch.compiler.is_compiling() and torch._nested_tensor_from_mask_left_aligned(
            src, ~_excluded(padding)
        )


def _excluded(padding: Tensor) -> Tensor:
    """True where a mask of either kind excludes a key."""
    return padding if padding.dtype == torch.bool else padding == float("-inf")


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask of nn.TransformerEncoder is the causal one."""
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    above = torch.ones_like(mask, dtype=torch.bool).triu(1)
    return bool((mask == (above if mask.dtype == torch.bool else additive(above, mask.dtype))).all())


class TransformerDecoderLayer(_FeedForward, _FromFloat, nn.TransformerDecoderLayer):
    """Drop-in for nn.TransformerDecoderLayer: the same arguments, parameters, inputs and outputs.

    Both of its attention layers are `lamina.nn.MultiheadAttention`.

    >>> layer = lamina.nn.TransformerDecoderLayer(512, 8, batch_first=True)
    >>> y = layer(tgt, memory, tgt_mask=nn.Transformer.generate_square_subsequent_mask(20), tgt_is_causal=True)
    """

    _torch = nn.TransformerDecoderLayer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for attention in (self.self_attn, self.multihead_attn):
            attention.__class__ = MultiheadAttention

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As torch's: tgt [L, B, E] ([B, L, E] if batch_first), memory [S, B, E], or both without B."""

        def attended(x: Tensor) -> Tensor:
            return self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        def looked_up(x: Tensor) -> Tensor:
            return self._mha_block(x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)

        if self.norm_first:
            y, x = _norm_and_sum(self.norm2, attended(self.norm1(tgt)), tgt)
            y, x = _norm_and_sum(self.norm3, looked_up(y), x)
            return x + self._ff_block(y)
        x = _norm_of_sum(self.norm1, attended(tgt), tgt)
        x = _norm_of_sum(self.norm2, looked_up(x), x)
        return _norm_of_sum(self.norm3, self._ff_block(x), x)


# The class that takes the place of each of torch's.
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    layer._torch: layer
    for layer in (MultiheadAttention, TransformerEncoderLayer, TransformerEncoder, TransformerDecoderLayer)
}


def adopt(module: nn.Module, reason: str) -> None:
    """Make a torch layer the lamina layer over the same memory, in its place, until all reasons are released."""
    if type(module) in LAYERS:
        module.__class__ = LAYERS[type(module)]
        module._adopted_for = set()
    if hasattr(module, "_adopted_for"):  # one that was built as lamina's stays that
        module._adopted_for.add(reason)


def release(module: nn.Module, reason: str) -> None:
    """The inverse of `adopt`."""
    if hasattr(module, "_adopted_for"):
        module._adopted_for.discard(reason)
        if not module._adopted_for:
            del module._adopted_for
            module.__class__ = module._torch


def in_proj_of(module: nn.MultiheadAttention) -> nn.Linear | PackedLinear | None:
    """The input projections as one linear layer: the one it is, or a new one over the parameters; None with kdim."""
    if "in_proj" in module._modules:
        return module._modules["in_proj"]
    weight = module._parameters["in_proj_weight"]
    if weight is None:
        return None
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = weight, module._parameters["in_proj_bias"]
    return linear.train(module.training)


def put_in_proj(module: MultiheadAttention, layer: PackedLinear) -> Callable[[], None]:
    """Make the input projections a layer; returns what makes them the parameters again that they were."""
    parameters = {name: module._parameters[name] for name in ("in_proj_weight", "in_proj_bias")}
    module._parameters.update(dict.fromkeys(parameters))
    module._modules["in_proj"] = layer

    def back() -> None:
        del module._modules["in_proj"]
        module._parameters.update(parameters)

    return back
