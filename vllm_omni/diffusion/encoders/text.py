"""Text encoders of transformers, as pipelines use them.

Shapes: L tokens, D features.
"""

from __future__ import annotations

import html
from typing import Any

import ftfy
import torch

from vllm_omni.diffusion.request import OmniDiffusionRequest
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


def encode_zero_padded_prompt(
    text_encoder: Any, tokenizer: Any, text: str, *, max_length: int, param: str
) -> torch.Tensor:
    """Last hidden states of ``text``, then zeros up to ``max_length`` tokens: ``[1, max_length, D]``.

    ``param`` names the request's field in the ``InvalidRequestError`` for a text of more tokens.
    """
    token_ids = tokenizer(text).input_ids
    if len(token_ids) > max_length:
        raise InvalidRequestError(
            f"{param} has {len(token_ids)} tokens, max_sequence_length is {max_length}; shorten the text or raise"
            " max_sequence_length",
            param=param,
        )
    input_ids = torch.tensor([token_ids], device=text_encoder.device)
    hidden: torch.Tensor = text_encoder(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids)
    ).last_hidden_state
    return zero_padded(hidden, max_length)


def zero_padded(embeds: torch.Tensor, length: int) -> torch.Tensor:
    """``[1, L, D] -> [1, length, D]``: zeros after the tokens."""
    return torch.nn.functional.pad(embeds, (0, 0, 0, length - embeds.shape[1]))


def clean_text(text: str) -> str:
    """``text`` with broken Unicode repaired, curly quotes and full-width characters made plain, HTML entities resolved
    and each run of white space as one space: what the captions of some models went through.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def check_prompt_embeds(request: OmniDiffusionRequest, width: int) -> None:
    """Raises ``InvalidRequestError`` unless given embeddings are ``width`` wide and within max_sequence_length."""
    max_length = request.sampling_params.max_sequence_length
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds: Any = request.prompt.get(name)
        if embeds is None:
            continue
        if embeds.shape[-1] != width:
            raise InvalidRequestError(f"{name} has width {embeds.shape[-1]}, the model's is {width}", param=name)
        if embeds.shape[-2] > max_length:
            raise InvalidRequestError(
                f"{name} has {embeds.shape[-2]} tokens, max_sequence_length is {max_length}", param=name
            )
