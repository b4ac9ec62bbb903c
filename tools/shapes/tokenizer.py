"""A small byte-level BPE tokenizer of class `Qwen2Tokenizer` for the captions of `scenes.py`.

`QwenImagePipeline` wraps each prompt in a fixed chat template and drops the first 34 token
embeddings, because the real tokenizer spends 34 tokens on what stands before the prompt. Trained on
that template, this one makes every word of it a token of its own and so spends 34 as well.
"""

from __future__ import annotations

import json
import random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tools.shapes import scenes

PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
PREFIX_TOKENS = 34
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _training_text() -> list[str]:
    rng = random.Random(0)
    captions = [scenes.caption(scenes.sample_scene(rng), rng) for _ in range(3000)]
    template = (PREFIX + "\n" + SUFFIX).replace("<|im_start|>", "").replace("<|im_end|>", "")
    return [template] * 50 + captions


def build_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer of the captions; the same result on every call."""
    tokenizer = train_tokenizer(_training_text())
    words = {*scenes.COLOURS, *scenes.SHAPES, "large", "small", "left", "right", "above", "below", "background"}
    check(tokenizer, PREFIX, SUFFIX, PREFIX_TOKENS, words)
    return tokenizer


def train_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Train the merges on `texts` and wrap them."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(m) for m in model["merges"]],
        extra_special_tokens=SPECIAL[1:],
        padding_side="right",
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def check(tokenizer: Qwen2Tokenizer, prefix: str, suffix: str, num_prefix_tokens: int, words: set[str]) -> None:
    """Fail where the pipeline's fixed cut would not fall right behind the prefix, or a word is not one token."""
    for prompt in ("a red circle", " ", ""):
        ids = tokenizer(prefix + prompt + suffix).input_ids
        if tokenizer.decode(ids[:num_prefix_tokens]) != prefix:
            raise ValueError(f"the template takes other than {num_prefix_tokens} tokens before {prompt!r}")
    for word in words:
        if len(tokenizer(" " + word).input_ids) != 1:
            raise ValueError(f"{word!r} is more than one token")
