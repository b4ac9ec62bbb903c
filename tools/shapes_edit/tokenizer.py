"""The tokenizer of the instructions, and the prompt template of `QwenImageEditPlusPipeline`.

The pipeline drops the first 64 token embeddings; trained on the template, this tokenizer spends 64 tokens there, one
for each word, as the real one does.
"""

from __future__ import annotations

import random
from functools import cache

from transformers import Qwen2Tokenizer

from tools.shapes import scenes
from tools.shapes.tokenizer import SUFFIX, check, train_tokenizer
from tools.shapes_edit.edits import sample_example

PREFIX = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n"
)
PREFIX_TOKENS = 64
# What stands between the prefix and the instruction, without the placeholder of the picture's features.
BEFORE_PICTURE, AFTER_PICTURE = "Picture 1: <|vision_start|>", "<|vision_end|>"


def _training_text() -> list[str]:
    rng = random.Random(0)
    instructions = [sample_example(rng).text for _ in range(3000)]
    marks = ("<|im_start|>", "<|im_end|>", "<|vision_start|>")
    template = PREFIX + BEFORE_PICTURE + "\n" + SUFFIX
    for mark in marks:
        template = template.replace(mark, "")
    return [template] * 50 + instructions


@cache
def build_tokenizer() -> Qwen2Tokenizer:
    """The same result on every call."""
    tokenizer = train_tokenizer(_training_text())
    words = {*scenes.COLOURS, *scenes.SHAPES, "large", "small", "left", "right", "top", "bottom", "center", "the"}
    check(tokenizer, PREFIX + BEFORE_PICTURE, SUFFIX, PREFIX_TOKENS + len(tokenizer(BEFORE_PICTURE).input_ids), words)
    check(tokenizer, PREFIX, SUFFIX, PREFIX_TOKENS, words)
    return tokenizer
