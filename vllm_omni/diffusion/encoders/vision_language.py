"""Vision-language encoders of transformers (Qwen2.5-VL, arXiv:2502.13923): prompts that show pictures.

A template marks each picture by one placeholder token, which is repeated once for each feature of the picture.

Shapes: L tokens, D features, V features of all pictures, P patches of all pictures, X values of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from vllm_omni.errors import InvalidRequestError

IMAGE_TOKEN = "<|image_pad|>"
# Tokens that stand for pictures or videos: in a user's text they would claim a picture that is not there.
_RESERVED_TOKENS = (IMAGE_TOKEN, "<|video_pad|>")


def check_no_reserved_tokens(text: str, param: str) -> None:
    """Raises ``InvalidRequestError`` for a text that holds a picture's placeholder."""
    for token in _RESERVED_TOKENS:
        if token in text:
            raise InvalidRequestError(
                f"{param} holds {token}, which stands for a picture; leave it out and give the picture as"
                " multi_modal_data={'image': ...}",
                param=param,
            )


class PicturePrompts:
    """The pictures of one request, as an encoder sees them: patched at once, encoded at the first prompt's need."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, pictures: Sequence[Image.Image]) -> None:
        """``model`` is a ``Qwen2_5_VLModel``: language model and vision tower without a head."""
        self._model = model
        self._tokenizer = tokenizer
        patches = image_processor(images=list(pictures), return_tensors="pt")
        self._pixel_values: torch.Tensor = patches["pixel_values"]  # [P, X]
        self._grids: torch.Tensor = patches["image_grid_thw"]  # [pictures, 3]: frames, rows, columns of patches
        self._merge_size: int = image_processor.merge_size
        self._features: torch.Tensor | None = None

    def encode(self, text: str, *, template: str, num_dropped_tokens: int, max_length: int, param: str) -> torch.Tensor:
        """Last hidden states of ``template`` filled with ``text``, ``[1, L, D]``, without the template's first tokens.

        ``param`` names the request's field in the ``InvalidRequestError`` for a text that takes more than
        ``max_length`` tokens with its template; tokens of pictures do not count.
        """
        token_ids = self._token_ids(template, text)
        num_tokens = len(token_ids) - num_dropped_tokens - sum(self._num_features())
        if num_tokens > max_length:
            raise InvalidRequestError(
                f"{param} has {num_tokens} tokens with its template, max_sequence_length is {max_length}; shorten the"
                " text or raise max_sequence_length",
                param=param,
            )
        language_model = self._model.language_model
        input_ids = torch.tensor([token_ids], device=language_model.device)
        embeds: torch.Tensor = language_model.get_input_embeddings()(input_ids)
        is_picture = (input_ids == self._image_token_id()).unsqueeze(-1).expand_as(embeds)
        # Tokens of a picture have positions in line, not on a grid, since the pipelines of diffusers 0.42 pass no
        # mm_token_type_ids to transformers 5 (huggingface/diffusers#14194), and results are to match theirs.
        hidden: torch.Tensor = language_model(
            inputs_embeds=embeds.masked_scatter(is_picture, self._picture_features().to(embeds.dtype)),
            attention_mask=torch.ones_like(input_ids),
            use_cache=False,
        ).last_hidden_state
        return hidden[:, num_dropped_tokens:]

    def describe(self, head: Any, template: str, max_new_tokens: int) -> str:
        """What ``head``, the generating model around this one, answers to ``template``: the likeliest words."""
        input_ids = torch.tensor([self._token_ids(template, "")], device=self._model.device)
        answer = head.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            pixel_values=self._pixel_values.to(self._model.device),
            image_grid_thw=self._grids.to(self._model.device),
            mm_token_type_ids=(input_ids == self._image_token_id()).int(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        words: str = self._tokenizer.decode(
            answer[0, input_ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return words.strip()

    def _picture_features(self) -> torch.Tensor:
        """``[V, D]``, by the vision tower: once, however many prompts show the pictures."""
        if self._features is None:
            device = self._model.device
            features = self._model.get_image_features(
                self._pixel_values.to(device), self._grids.to(device), return_dict=True
            ).pooler_output
            self._features = torch.cat(list(features))
        return self._features

    def _num_features(self) -> list[int]:
        """Features of each picture: patches are merged in squares."""
        return [math.prod(grid) // self._merge_size**2 for grid in self._grids.tolist()]

    def _token_ids(self, template: str, text: str) -> list[int]:
        counts = self._num_features()
        before, *pieces = template.split(IMAGE_TOKEN)
        assert len(pieces) == len(counts), "a template has one placeholder for each picture"
        filled = before + "".join(IMAGE_TOKEN * count + piece for count, piece in zip(counts, pieces, strict=True))
        # Not str.format: braces in a user's text are text.
        token_ids: list[int] = self._tokenizer(filled.replace("{}", text, 1)).input_ids
        return token_ids

    def _image_token_id(self) -> int:
        token_id: int = self._tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        return token_id
