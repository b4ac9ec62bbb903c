"""The tiny text encoder and transformer, and forward passes for training them fast.

The modules are the unchanged transformers and diffusers classes, so that their weights save and load
as usual. Only the forward passes are written anew, on the same parameters: real instead of complex
rotary arithmetic, the fixed prompt prefix computed once per batch instead of once per caption, and no
work on the text half of the last block, which nothing reads. `tests/tools/test_shapes.py` holds
them against the originals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, TEXT_KV_HEADS = 128, 3, 4, 2
LATENT_SIDE = 16  # rows and columns of a latent picture
TOKEN_SIDE = LATENT_SIDE // 2  # rows and columns of 2 x 2 patches
IMAGE_SHAPES = ((1, TOKEN_SIDE, TOKEN_SIDE),)  # frames, rows and columns of each picture


UNUSED_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": TEXT_WIDTH,
    "fullatt_block_indexes": [0],
}


def build_text_encoder(
    tokenizer: Qwen2Tokenizer, layers: int = TEXT_LAYERS, vision_config: dict[str, Any] = UNUSED_VISION
) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL of about 0.7 million parameters. Captions make no use of the pictures half."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("endoftext", "im_end", "image_pad")}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 64 * -(-len(tokenizer) // 64),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 3 * TEXT_WIDTH,
            "num_hidden_layers": layers,
            "num_attention_heads": TEXT_HEADS,
            "num_key_value_heads": TEXT_KV_HEADS,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids["endoftext"],
            "eos_token_id": ids["im_end"],
            "pad_token_id": None,
        },
        vision_config=vision_config,
        image_token_id=ids["image_pad"],
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def build_transformer(layers: int = 6, heads: int = 6, latent_channels: int = 16) -> QwenImageTransformer2DModel:
    """A random transformer whose blocks and output start as zero, the usual start of such models."""
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * latent_channels,
        out_channels=latent_channels,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    for block in model.transformer_blocks:
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            nn.init.zeros_(modulation.weight)
            nn.init.zeros_(modulation.bias)
    for layer in (model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def pack(latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] to tokens [B, HW / 4, 4C]: 2 x 2 patches, row by row, as the pipeline packs."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


# ---------------------------------------------------------------- text encoder


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, heads, L, 32] by tables [L, 32]; halves form the pairs."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def text_tables(model: nn.Module, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, 32]; the three axes of the rotary positions agree on text."""
    frequencies = model.model.language_model.rotary_emb.inv_freq.float()
    angles = torch.arange(length, device=frequencies.device)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _text_qkv(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention = layer.self_attn
    x = rms_norm(x, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon)
    q, k, v = (
        p(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return rotate_halves(q, cos, sin).to(v.dtype), rotate_halves(k, cos, sin).to(v.dtype), v


def _text_rest(layer: nn.Module, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
    x = x + layer.self_attn.o_proj(out.transpose(1, 2).flatten(2))
    return x + layer.mlp(
        rms_norm(x, layer.post_attention_layernorm.weight, layer.post_attention_layernorm.variance_epsilon)
    )


def embedded(text: nn.Module, ids: Tensor) -> Tensor:
    """Embeddings [..., width] of ids, as a product.

    The gradient of a lookup may wait for the device, which a CUDA graph cannot.
    """
    table = text.embed_tokens.weight
    with torch.autocast(ids.device.type, enabled=False):
        return (ids[..., None] == torch.arange(len(table), device=ids.device)).to(table.dtype) @ table


def encode_text(model: nn.Module, prefix: Tensor, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Last hidden states [B, L, width] of captions `ids` [B, L] behind the shared `prefix` [P] of ids.

    Attention looks back only, so the prefix never depends on the caption: it runs as a batch of one.
    Padding at the end of `ids` needs no mask for the same reason.
    """
    return encode_embeds(model, prefix, embedded(model.model.language_model, ids), cos, sin)[1]


def encode_embeds(model: nn.Module, prefix: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states of the prefix [1, P, width] and of embeddings `x` [B, L, width] behind it."""
    text = model.model.language_model
    p, n = prefix.shape[0], x.shape[1]
    causal = torch.full((p + n, p + n), float("-inf"), device=x.device).triu(1)
    head = embedded(text, prefix)[None]
    for layer in text.layers:
        q, k, v = _text_qkv(layer, head, cos[:p], sin[:p])
        head = _text_rest(layer, head, q, k, v, causal[:p, :p])
        qx, kx, vx = _text_qkv(layer, x, cos[p : p + n], sin[p : p + n])
        kx = torch.cat((k.expand(len(x), -1, -1, -1), kx), dim=2)
        vx = torch.cat((v.expand(len(x), -1, -1, -1), vx), dim=2)
        x = _text_rest(layer, x, qx, kx, vx, causal[p:])
    weight, eps = text.norm.weight, text.norm.variance_epsilon
    return rms_norm(head, weight, eps), rms_norm(x, weight, eps)


# ---------------------------------------------------------------- transformer


def image_tables(
    model: QwenImageTransformer2DModel, text_length: int, shapes: tuple[tuple[int, int, int], ...] = IMAGE_SHAPES
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [L, 1, 16] for text and image tokens, in that order; `shapes` of pictures in tokens."""
    image, text = model.pos_embed([list(shapes)], max_txt_seq_len=text_length, device=model.device)
    joint = torch.cat((text, image))[:, None]
    return joint.real.float().contiguous(), joint.imag.float().contiguous()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, L, heads, 32] by tables [L, 1, 16]; neighbours form the pairs."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def _shift(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def block_forward(
    block: nn.Module, image: Tensor, text: Tensor, mask: Tensor, temb: Tensor, cos: Tensor, sin: Tensor, last: bool
) -> tuple[Tensor, Tensor]:
    """One double block. `mask` is additive, [B, 1, 1, L]; image [B, I, d], text [B, T, d], temb [B, d]."""
    attention, length = block.attn, text.shape[1]
    s1, c1, g1, s2, c2, g2 = block.img_mod(temb)[:, None].chunk(6, dim=-1)
    ts1, tc1, tg1, ts2, tc2, tg2 = block.txt_mod(temb)[:, None].chunk(6, dim=-1)
    x, y = _shift(image, s1, c1), _shift(text, ts1, tc1)
    width = attention.inner_dim // attention.heads
    heads = (attention.heads, width)
    q = torch.cat(
        (
            rms_norm(attention.add_q_proj(y).unflatten(-1, heads), attention.norm_added_q.weight, 1e-6),
            rms_norm(attention.to_q(x).unflatten(-1, heads), attention.norm_q.weight, 1e-6),
        ),
        dim=1,
    )
    k = torch.cat(
        (
            rms_norm(attention.add_k_proj(y).unflatten(-1, heads), attention.norm_added_k.weight, 1e-6),
            rms_norm(attention.to_k(x).unflatten(-1, heads), attention.norm_k.weight, 1e-6),
        ),
        dim=1,
    )
    v = torch.cat((attention.add_v_proj(y), attention.to_v(x)), dim=1).unflatten(-1, heads)
    q, k = (_rotate(z, cos, sin).to(v.dtype).transpose(1, 2) for z in (q, k))
    out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask.to(v.dtype))
    out = out.transpose(1, 2).flatten(2)
    image = image + g1 * attention.to_out[0](out[:, length:])
    image = image + g2 * block.img_mlp(_shift(image, s2, c2))
    if last:  # what the last block makes of the text is read by nobody
        return image, text
    text = text + tg1 * attention.to_add_out(out[:, :length])
    return image, text + tg2 * block.txt_mlp(_shift(text, ts2, tc2))


def predict(
    model: QwenImageTransformer2DModel,
    tokens: Tensor,
    text: Tensor,
    mask: Tensor,
    sigma: Tensor,
    cos: Tensor,
    sin: Tensor,
    block_fn: Callable[..., tuple[Tensor, Tensor]] = block_forward,
) -> Tensor:
    """Velocity [B, I, C] of noisy `tokens` [B, I, C] at `sigma` [B] in 0..1; `mask` [B, 1, 1, L]."""
    image = model.img_in(tokens)
    text = model.txt_in(rms_norm(text, model.txt_norm.weight, 1e-6))
    # The sinusoid stays in single precision: its fast waves would be lost in bfloat16.
    waves = model.time_text_embed.time_proj(sigma.float())
    temb = model.time_text_embed.timestep_embedder(waves)
    last = len(model.transformer_blocks) - 1
    for i, block in enumerate(model.transformer_blocks):
        image, text = block_fn(block, image, text, mask, temb, cos, sin, i == last)
    scale, shift = model.norm_out.linear(F.silu(temb))[:, None].chunk(2, dim=-1)
    return model.proj_out(_shift(image, shift, scale))
