"""The text encoder of CLIP (arXiv:2103.00020), for models that take one vector of a prompt.

Shapes: P width of the pooled vector.
"""

from __future__ import annotations

from typing import Any

import torch


def encode_pooled_prompt(text_encoder: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """The pooled vector of ``text``, ``[1, P]``.

    CLIP reads no more than the positions that it was trained with, 77 tokens. Models pair it with an encoder that
    reads the whole text, so a longer text is cut here and is no error.
    """
    encoded = tokenizer(
        text,
        padding="max_length",
        truncation=True,
        max_length=text_encoder.config.max_position_embeddings,
        return_tensors="pt",
    )
    pooled: torch.Tensor = text_encoder(encoded.input_ids.to(text_encoder.device)).pooler_output
    return pooled
