"""LSTM and GRU classifiers that read an image row by row, as a sequence of image_size steps.

LSTM: "Long Short-Term Memory" (Hochreiter & Schmidhuber 1997) with the forget gate of Gers et al. 2000.
GRU: "Learning Phrase Representations using RNN Encoder-Decoder" (Cho et al. 2014, arXiv:1406.1078).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lamina.models.registry import register

_CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


@dataclass(frozen=True)
class RNNClassifierConfig:
    """
    cell: "lstm" or "gru".
    image_size: rows (steps) and columns (features of a step) of the images, [B, 1, image_size, image_size].
    hidden: width of the state.
    layers: stacked recurrent layers.
    bidirectional: also read from the last row to the first.
    num_classes: size of the output.
    """

    cell: Literal["lstm", "gru"] = "lstm"
    image_size: int = 28
    hidden: int = 128
    layers: int = 1
    bidirectional: bool = False
    num_classes: int = 10


@register(lstm=RNNClassifierConfig(cell="lstm"), gru=RNNClassifierConfig(cell="gru"))
class RNNClassifier(nn.Module):
    """Images [B, 1, S, S] float32 -> logits [B, num_classes], from the last state of the top layer.

    Example:
        >>> RNNClassifier(RNNClassifierConfig(cell="gru"))(torch.rand(4, 1, 28, 28)).shape
        torch.Size([4, 10])
    """

    def __init__(self, config: RNNClassifierConfig):
        super().__init__()
        if config.cell not in _CELLS:
            raise ValueError(f"RNNClassifier cell is {config.cell!r}, must be 'lstm' or 'gru'")
        self.config = config
        self.rnn = _CELLS[config.cell](
            config.image_size,
            config.hidden,
            num_layers=config.layers,
            bidirectional=config.bidirectional,
            batch_first=True,
        )
        self.head = nn.Linear(config.hidden * (2 if config.bidirectional else 1), config.num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = images.squeeze(1)  # [B, 1, S, S] -> [B, S, S]: step, feature
        _, state = self.rnn(rows)
        hidden = state[0] if self.config.cell == "lstm" else state  # [layers * directions, B, H]
        directions = 2 if self.config.bidirectional else 1
        last = hidden[-directions:].transpose(0, 1).flatten(1)  # [directions, B, H] -> [B, directions * H]
        return self.head(last)

    @staticmethod
    def example_inputs(config: RNNClassifierConfig, batch: int) -> tuple[torch.Tensor]:
        return (torch.rand(batch, 1, config.image_size, config.image_size),)
