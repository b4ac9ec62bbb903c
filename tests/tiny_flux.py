"""Tiny FLUX.1 pipelines, random, in the folder layout of the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from tests.tiny import initialize

_CAPTIONS = ["a red circle left of a small blue square on a yellow background", "a cat holding a sign that says hello"]


def flux(folder: Path, *, guidance_embeds: bool = True, seed: int = 0) -> Path:
    """FLUX.1-dev, or FLUX.1-schnell without ``guidance_embeds``: two blocks of each kind, 4 heads of 16."""
    FluxPipeline(**_components(guidance_embeds, seed)).save_pretrained(folder)
    return folder


def flux_kontext(folder: Path, *, seed: int = 0) -> Path:
    """FLUX.1 Kontext: the same parts under another pipeline."""
    FluxKontextPipeline(**_components(True, seed)).save_pretrained(folder)
    return folder


def clip_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """A byte-level BPE with word ends, trained on the words of ``texts``."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=alphabet,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator([text.lower() for text in texts], trainer)
    bpe = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = bpe["vocab"]
    for letter in sorted(alphabet):
        vocab.setdefault(f"{letter}</w>", len(vocab))
    merges = [tuple(pair) for pair in bpe["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token="<|endoftext|>", model_max_length=77)


def clip_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def t5_tokenizer(texts: list[str]) -> T5Tokenizer:
    """A unigram vocabulary: the words of ``texts``, and single letters for all others."""
    words = sorted({f"▁{word}" for text in texts for word in text.split()})
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(word, -2.0) for word in words] + [(letter, -6.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def autoencoder_kl() -> AutoencoderKL:
    """Four latent channels at an eighth of the size."""
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _components(guidance_embeds: bool, seed: int) -> dict[str, Any]:
    tokenizer, tokenizer_2 = clip_tokenizer(_CAPTIONS), t5_tokenizer(_CAPTIONS)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    schedule: dict[str, Any] = {"use_dynamic_shifting": True, "shift": 3.0} if guidance_embeds else {"shift": 1.0}
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(**schedule),
        "vae": initialize(autoencoder_kl(), seed),
        "text_encoder": initialize(clip_text_encoder(tokenizer), seed + 1),
        "tokenizer": tokenizer,
        "text_encoder_2": initialize(t5_encoder(tokenizer_2), seed + 2),
        "tokenizer_2": tokenizer_2,
        "transformer": initialize(transformer, seed + 3),
    }
