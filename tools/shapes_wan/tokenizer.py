"""A T5 tokenizer whose tokens are the words of `clips.py`, and letters for all else."""

from __future__ import annotations

from transformers import T5Tokenizer

from tools.shapes import scenes
from tools.shapes_wan.clips import DIRECTIONS

_WORDS = ("a", "an", *scenes.COLOURS, *scenes.SHAPES, "moving", *DIRECTIONS, "on", "background")


def build_tokenizer() -> T5Tokenizer:
    """The same on every call. Long pieces score higher, so that a known word is one token."""
    pieces = [f"▁{word}" for word in _WORDS] + ["▁", *(chr(code) for code in range(33, 127))]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(piece, -100.0 / len(piece)) for piece in dict.fromkeys(pieces)]
    return T5Tokenizer(vocab=vocab, extra_ids=0)
