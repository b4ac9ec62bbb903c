"""The encoder of T5 (arXiv:1910.10683), for models that take the hidden states of a prompt.

Shapes: L tokens, D features.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_omni.errors import InvalidRequestError


def encode_padded_prompt(text_encoder: Any, tokenizer: Any, text: str, *, max_length: int, param: str) -> torch.Tensor:
    """Last hidden states of ``text`` padded to ``max_length`` tokens, ``[1, max_length, D]``.

    Nothing is masked: the models that were trained so take the hidden states of the padding as part of the prompt.
    ``param`` names the request's field in the ``InvalidRequestError`` for a text of more tokens.
    """
    token_ids = tokenizer(text, padding="max_length", max_length=max_length).input_ids
    if len(token_ids) > max_length:
        raise InvalidRequestError(
            f"{param} has {len(token_ids)} tokens, max_sequence_length is {max_length}; shorten the text or raise"
            " max_sequence_length",
            param=param,
        )
    hidden: torch.Tensor = text_encoder(torch.tensor([token_ids], device=text_encoder.device)).last_hidden_state
    return hidden
