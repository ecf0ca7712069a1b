"""Encoder-decoder RNN with attention.

The bidirectional encoder and additive scores are "Neural Machine Translation by Jointly Learning to Align and
Translate" (Bahdanau et al. 2015, arXiv:1409.0473); attention comes after the decoder's RNN, not before it, as in
"Effective Approaches to Attention-based Neural Machine Translation" (Luong et al. 2015, arXiv:1508.04025). So with
teacher forcing the decoder is one call of nn.GRU or nn.LSTM over the whole target instead of a Python loop over steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lamina.models.attention import AdditiveAttention, ScaledDotProductAttention
from lamina.models.registry import register

_CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


@dataclass(frozen=True)
class Seq2SeqConfig:
    """
    cell: "lstm" or "gru", in encoder and decoder.
    attention: "additive" (Bahdanau) or "dot" (scaled dot product, through ScaledDotProductAttention).
    source_vocab, target_vocab: sizes of the vocabularies.
    embedding: width of the word vectors.
    hidden: width of the decoder's state; the encoder has as much in each direction.
    layers: stacked recurrent layers, in encoder and decoder.
    dropout: after the embeddings and between recurrent layers, in training.
    pad, bos, eos: token ids of padding, begin and end, in both vocabularies.
    """

    cell: Literal["lstm", "gru"] = "gru"
    attention: Literal["additive", "dot"] = "additive"
    source_vocab: int = 8000
    target_vocab: int = 8000
    embedding: int = 256
    hidden: int = 256
    layers: int = 1
    dropout: float = 0.1
    pad: int = 0
    bos: int = 1
    eos: int = 2


# Reads dates character by character.
_DATES = Seq2SeqConfig(source_vocab=74, target_vocab=14, embedding=32, hidden=128, dropout=0.0)


@register(seq2seq=Seq2SeqConfig(), seq2seq_dates=_DATES)
class Seq2Seq(nn.Module):
    """Source tokens [B, S] and target tokens [B, T], int64 -> logits [B, T, target_vocab] of the tokens that follow.

    `target` starts with bos; logits[:, i] predicts target[:, i + 1] (teacher forcing). When sources of different
    lengths are padded at the end, give `source_lengths` [B], int64: neither encoder nor attention reads the padding.

    Example:
        >>> model = Seq2Seq(Seq2SeqConfig(source_vocab=50, target_vocab=60)).eval()
        >>> model(torch.randint(3, 50, (2, 7)), torch.randint(3, 60, (2, 5))).shape
        torch.Size([2, 5, 60])
        >>> model.greedy_decode(torch.randint(3, 50, (2, 7)), max_length=4).shape
        torch.Size([2, 4])
    """

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        if config.cell not in _CELLS:
            raise ValueError(f"Seq2Seq cell is {config.cell!r}, must be 'lstm' or 'gru'")
        if config.attention not in ("additive", "dot"):
            raise ValueError(f"Seq2Seq attention is {config.attention!r}, must be 'additive' or 'dot'")
        self.config = config
        rnn = _CELLS[config.cell]
        between_layers = config.dropout if config.layers > 1 else 0.0
        self.source_embedding = nn.Embedding(config.source_vocab, config.embedding)
        self.target_embedding = nn.Embedding(config.target_vocab, config.embedding)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = rnn(
            config.embedding,
            config.hidden,
            num_layers=config.layers,
            dropout=between_layers,
            bidirectional=True,
            batch_first=True,
        )
        self.memory = nn.Linear(2 * config.hidden, config.hidden)
        self.bridge = nn.Linear(2 * config.hidden, config.hidden)
        self.decoder = rnn(
            config.embedding, config.hidden, num_layers=config.layers, dropout=between_layers, batch_first=True
        )
        self.attention = (
            AdditiveAttention(config.hidden) if config.attention == "additive" else ScaledDotProductAttention()
        )
        self.combine = nn.Linear(2 * config.hidden, config.hidden)
        self.head = nn.Linear(config.hidden, config.target_vocab)

    def forward(
        self, source: torch.Tensor, target: torch.Tensor, source_lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        memory, mask, state = self._encode(source, source_lengths)
        logits, _ = self._decode(target, memory, mask, state)
        return logits

    @torch.no_grad()
    def greedy_decode(
        self, source: torch.Tensor, max_length: int, source_lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The likeliest next token at every step: [B, max_length] int64, without bos, pad after eos."""
        memory, mask, state = self._encode(source, source_lengths)
        batch = source.shape[0]
        token = source.new_full((batch, 1), self.config.bos)
        output = source.new_full((batch, max_length), self.config.pad)
        finished = torch.zeros(batch, dtype=torch.bool, device=source.device)
        for step in range(max_length):
            logits, state = self._decode(token, memory, mask, state)
            token = logits.argmax(-1).masked_fill(finished[:, None], self.config.pad)  # [B, 1]
            output[:, step] = token[:, 0]
            finished |= token[:, 0] == self.config.eos
            if finished.all():
                break
        return output

    def _encode(self, source, source_lengths):
        """-> memory [B, 1, S, H], mask [B, 1, 1, S] bool or None, state of the decoder [layers, B, H] (LSTM: two)."""
        embedded = self.dropout(self.source_embedding(source))  # [B, S, E]
        if source_lengths is None:
            outputs, state = self.encoder(embedded)
            mask = None
        else:
            packed = pack_padded_sequence(embedded, source_lengths.cpu(), batch_first=True, enforce_sorted=False)
            outputs, state = self.encoder(packed)
            outputs, _ = pad_packed_sequence(outputs, batch_first=True, total_length=source.shape[1])
            position = torch.arange(source.shape[1], device=source.device)
            mask = (position < source_lengths.to(source.device)[:, None])[:, None, None]  # [B, 1, 1, S]
        memory = self.memory(outputs).unsqueeze(1)  # [B, S, 2H] -> [B, 1, S, H]
        if self.config.cell == "lstm":
            return memory, mask, tuple(self._join_directions(part) for part in state)
        return memory, mask, self._join_directions(state)

    def _join_directions(self, state):
        """[layers * 2, B, H] of the encoder -> [layers, B, H] for the decoder."""
        both = state.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)  # [layers, 2, B, H] -> [layers, B, 2H]
        return torch.tanh(self.bridge(both))

    def _decode(self, tokens, memory, mask, state):
        """tokens [B, T] -> logits [B, T, V] and the state after them."""
        outputs, state = self.decoder(self.dropout(self.target_embedding(tokens)), state)  # [B, T, H]
        context = self.attention(outputs.unsqueeze(1), memory, memory, attn_mask=mask).squeeze(1)  # [B, T, H]
        return self.head(torch.tanh(self.combine(torch.cat((outputs, context), dim=-1)))), state

    @staticmethod
    def example_inputs(config: Seq2SeqConfig, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        first_word = max(config.pad, config.bos, config.eos) + 1
        source = torch.randint(first_word, config.source_vocab, (batch, 24))
        target = torch.randint(first_word, config.target_vocab, (batch, 20))
        target[:, 0] = config.bos
        return source, target
