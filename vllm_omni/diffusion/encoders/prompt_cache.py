"""A cache of prompt embeddings: equal prompts (above all, negative ones) are encoded once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image

from vllm_omni.diffusion.data import OmniDiffusionConfig


class PromptEmbedCache:
    """The most recently used embeddings, on the device that computed them. It belongs to one pipeline.

    A pipeline that encodes its prompts through one says so by ``caches_prompt_embeds = True`` and has it as
    ``prompt_embed_cache``. What a hit returns is the very tensor of the first time, so results do not depend on the
    cache, and nobody may write to it.
    """

    def __init__(self, max_entries: int) -> None:
        """``max_entries`` of 0 keeps nothing, but for :meth:`sharing`."""
        self._max_entries = max_entries
        self._is_sharing = False
        self._embeds: OrderedDict[Hashable, torch.Tensor] = OrderedDict()

    @classmethod
    def from_config(cls, od_config: OmniDiffusionConfig) -> PromptEmbedCache:
        """As large as configured; of no entries unless ``enable_prompt_embed_cache`` is set."""
        return cls(od_config.prompt_embed_cache_size if od_config.enable_prompt_embed_cache else 0)

    def __len__(self) -> int:
        return len(self._embeds)

    def get(self, key: Hashable, encode: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The embedding of ``key``, which holds all that it depends on; by ``encode`` if it is not kept."""
        embeds = self._embeds.get(key)
        if embeds is None:
            embeds = self._embeds[key] = encode()
        self._embeds.move_to_end(key)
        if not self._is_sharing:
            self._let_go()
        return embeds

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Nothing is let go before the end of the block: requests prepared within it encode equal prompts once."""
        self._is_sharing = True
        try:
            yield
        finally:
            self._is_sharing = False
            self._let_go()

    def _let_go(self) -> None:
        while len(self._embeds) > self._max_entries:
            self._embeds.popitem(last=False)


def pictures_key(pictures: Sequence[Image.Image]) -> tuple[Hashable, ...]:
    """A key for pictures that an embedding depends on: equal for equal pixels."""
    return tuple((picture.mode, picture.size, hashlib.sha256(picture.tobytes()).hexdigest()) for picture in pictures)
