"""Text encoders of transformers, as pipelines use them.

Shapes: L tokens, D features.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_omni.errors import InvalidRequestError


def encode_templated_prompt(
    text_encoder: Any,
    tokenizer: Any,
    text: str,
    *,
    template: str,
    num_dropped_tokens: int,
    max_length: int,
    param: str,
) -> torch.Tensor:
    """Last hidden states of ``template`` filled with ``text``, ``[1, L, D]``, without the template's first tokens.

    ``param`` names the request's field in the ``InvalidRequestError`` for a text of more than ``max_length`` tokens.
    """
    # Not str.format: braces in a user's text are text.
    token_ids = tokenizer(template.replace("{}", text, 1)).input_ids
    num_tokens = len(token_ids) - num_dropped_tokens
    if num_tokens > max_length:
        raise InvalidRequestError(
            f"{param} has {num_tokens} tokens with its template, max_sequence_length is {max_length}; shorten the text"
            " or raise max_sequence_length",
            param=param,
        )
    input_ids = torch.tensor([token_ids], device=text_encoder.device)
    hidden: torch.Tensor = text_encoder(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False
    ).last_hidden_state
    return hidden[:, num_dropped_tokens:]
