"""Texts to vectors, by a sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from rectokens.cli.progress import progress_bar
from server.demo.data import DataFolderError

DEFAULT_TEXT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def embed_texts(
    texts: Sequence[str],
    model: str = DEFAULT_TEXT_MODEL,
    *,
    batch_size: int = 64,
    max_tokens: int = 256,
) -> NDArray[np.float32]:
    """Mean of the last hidden states over a text's tokens, of unit length.

    Args:
        texts: N.
        model: an encoder, by name or folder.
        batch_size: texts at a time.
        max_tokens: the beginning of a longer text counts.

    Returns:
        float32 (N, H).

    Raises:
        DataFolderError: no such model, or one that is no encoder.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        encoder = AutoModel.from_pretrained(model).eval()
    except (OSError, ValueError) as error:
        raise DataFolderError(
            f"cannot load the text model {model!r}: {error}. text_model may also name a folder"
        ) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = encoder.to(device)
    # Neighbours of similar length need little padding.
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    vectors = torch.empty(len(texts), encoder.config.hidden_size)
    with torch.inference_mode(), progress_bar("embedding texts", len(texts)) as show:
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            inputs = tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=max_tokens,
                return_tensors="pt",
            ).to(device)
            states = encoder(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1).float()
            means = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
            vectors[rows] = F.normalize(means, dim=1).cpu()
            show(first + len(rows))
    return vectors.numpy()
