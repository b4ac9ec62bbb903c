"""The text encoder that sees, and forward passes for training it and the transformer fast.

As in `tools/shapes/models.py` the modules are the unchanged classes; `tests/tools/test_shapes_edit.py` holds these
forward passes against them.

Legend: B examples, P patches of a picture, V features of a picture, L tokens behind it, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tools.shapes import models
from tools.shapes_edit.resize import VISION_SIDE
from tools.shapes_edit.tokenizer import PREFIX_TOKENS

TEXT_LAYERS = 2
PATCH, MERGE = 32, 3  # pixels of a patch, patches of a feature per side: large ones, for few tokens in the prompt
GRID = VISION_SIDE // PATCH
NUM_FEATURES = (GRID // MERGE) ** 2
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": models.TEXT_WIDTH,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "window_size": VISION_SIDE,
    "fullatt_block_indexes": [0],
}
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of the processor
LATENT_CHANNELS = 12
TOKEN_SIDE = 16  # rows and columns of 2 x 2 latents, of the noisy picture and of the source
NUM_TOKENS = TOKEN_SIDE**2
IMAGE_SHAPES = ((1, TOKEN_SIDE, TOKEN_SIDE),) * 2


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL of about 0.8 million parameters, 0.3 of them in its vision tower."""
    return models.build_text_encoder(tokenizer, TEXT_LAYERS, VISION)


def patches(pictures: Tensor) -> Tensor:
    """Pictures [B, 3, 384, 384] in -1..1 to normalised patches [B, P, 3 * 32 * 32], in the processor's order."""
    mean, std = (torch.tensor(v, device=pictures.device).view(-1, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    x = ((pictures + 1) / 2 - mean) / std
    x = x.view(len(x), 3, GRID // MERGE, MERGE, PATCH, GRID // MERGE, MERGE, PATCH)
    return x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(len(x), GRID**2, 3 * PATCH**2)


def principal_components(samples: Tensor, count: int) -> Tensor:
    """The `count` directions [count, X] that say most of `samples` [N, X], scaled to unit variance."""
    values, vectors = torch.linalg.eigh((samples.T @ samples / len(samples)).double())
    return (vectors[:, -count:] / values[-count:].sqrt()).T.flip(0).to(samples.dtype)


def set_patch_embedding(model: nn.Module, components: Tensor) -> None:
    """Let the vision tower project patches onto `components` [D, X]. A still picture comes as two equal frames."""
    weight = model.model.visual.patch_embed.proj.weight
    weight.data.copy_(components.view(-1, 3, 1, PATCH, PATCH).expand_as(weight) / 2)


def vision_tables(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Cosine and sine [P, 16] of the rows and columns of patches, in the processor's order."""
    config, device = model.config.vision_config, model.device
    spatial = config.hidden_size // config.num_heads // 2
    frequencies = 10000.0 ** -(torch.arange(0, spatial, 2, device=device) / spatial)
    span = torch.arange(GRID, device=device)
    grid = torch.stack(torch.meshgrid(span, span, indexing="ij"), dim=-1)
    grid = grid.view(GRID // MERGE, MERGE, GRID // MERGE, MERGE, 2).transpose(1, 2).reshape(-1, 2)
    angles = (grid[:, :, None] * frequencies).flatten(1)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def see(visual: nn.Module, embedded: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Embedded patches [B, P, 32] to features [B, V, D], by the one block of the vision tower and its merger."""
    x = embedded
    for block in visual.blocks:
        attention = block.attn
        hidden = models.rms_norm(x, block.norm1.weight, 1e-6)
        q, k, v = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (models.rotate_halves(z, cos, sin).to(v.dtype) for z in (q, k))
        x = x + attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + block.mlp(models.rms_norm(x, block.norm2.weight, 1e-6))
    merged = models.rms_norm(x, visual.merger.ln_q.weight, 1e-6).unflatten(1, (-1, MERGE**2)).flatten(2)
    return visual.merger.mlp(merged)


def encode_prompt(
    model: nn.Module,
    prefix: Tensor,
    embedded: Tensor,
    ids: Tensor,
    text_tables: tuple[Tensor, Tensor],
    vision_tables: tuple[Tensor, Tensor],
) -> Tensor:
    """What the pipeline hands the transformer of each prompt, [B, H + V + L, D].

    `prefix` [64 + H] are the ids of the template up to the picture, `embedded` [B, P, 32] is the picture, `ids` [B, L]
    stand behind it. Its features have positions in line, as text has.
    """
    features = see(model.model.visual, embedded, *vision_tables)
    text = models.embedded(model.model.language_model, ids)
    head, rest = models.encode_embeds(model, prefix, torch.cat((features.to(text.dtype), text), dim=1), *text_tables)
    return torch.cat((head[:, PREFIX_TOKENS:].expand(len(rest), -1, -1), rest), dim=1)
