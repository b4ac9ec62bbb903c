"""Tiny random checkpoints in the folder layout of the real ones, built offline and in seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial"
    " relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
_SPECIAL_TOKENS += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
_CAPTIONS = ["a red circle left of a small blue square on a yellow background", "a cat holding a sign that says hello"]


def qwen_image(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen-Image pipeline: two blocks, 4 heads of 16, 4 latent channels at an eighth of the size."""
    tokenizer = qwen_tokenizer([QWEN_TEMPLATE, *_CAPTIONS])
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.1, 2.0],
    )
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256,
            base_shift=0.5,
            max_image_seq_len=8192,
            max_shift=0.9,
            shift_terminal=0.02,
            use_dynamic_shifting=True,
        ),
        vae=initialize(vae, seed),
        text_encoder=initialize(qwen_text_encoder(tokenizer), seed + 1),
        tokenizer=tokenizer,
        transformer=initialize(transformer, seed + 2),
    )
    pipeline.save_pretrained(folder)
    return folder


def qwen_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """A byte-level BPE that was trained on ``texts``, so that their words are single tokens."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=1000, min_frequency=1, show_progress=False)
    bpe = json.loads(trained.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        extra_special_tokens=_SPECIAL_TOKENS,
    )


def qwen_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL: two layers of width 32, and a vision tower of the same size."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def initialize(module: nn.Module, seed: int) -> nn.Module:
    """Weights that depend on the seed alone, and with which the output depends on every input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and parameter.squeeze().dim() <= 1 and not name.endswith("bias"):
                parameter.copy_(1 + 0.05 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            elif parameter.dim() >= 2:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.02 * noise)
    return module.eval()
