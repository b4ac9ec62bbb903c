"""The small text encoder and transformer, and forward passes for training them fast.

The modules are the unchanged transformers and diffusers classes, so that their weights save and load as usual. Only
the forward passes are written anew, on the same parameters. Text is padded to 512 tokens of zeros, which all have the
same key and value: training attends to one of them, whose logit carries the logarithm of their number.
`tests/tools/test_shapes_wan.py` holds the forward passes against the originals.

Legend: B clips, L text tokens, S tokens of a clip, J text width, D transformer width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from tools.shapes_wan.clips import NUM_FRAMES
from tools.shapes_wan.vae_train import LATENT_CHANNELS, LATENT_SIDE

TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 128, 2, 4
HEAD_DIM = 32
PADDED_TEXT = 512  # tokens that the pipeline pads every text to


def build_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """A random UMT5 encoder of about 0.4 million parameters."""
    config = UMT5Config(
        vocab_size=8 * -(-len(tokenizer) // 8),
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // TEXT_HEADS,
        d_ff=2 * TEXT_WIDTH,
        num_layers=TEXT_LAYERS,
        num_heads=TEXT_HEADS,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config)


def build_transformer(layers: int = 5, heads: int = 6) -> WanTransformer3DModel:
    """A random transformer whose blocks and output start as zero, the usual start of such models."""
    width = heads * HEAD_DIM
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=HEAD_DIM,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=4 * width,
        num_layers=layers,
    )
    for block in model.blocks:
        nn.init.zeros_(block.scale_shift_table)
        nn.init.zeros_(block.attn2.to_out[0].weight)
    nn.init.zeros_(model.scale_shift_table)
    for layer in (model.condition_embedder.time_proj, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # By one kernel, which autocast would run in float32.
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def _narrow(x: Tensor) -> Tensor:
    """What autocast would do for each of the layers that read `x`, once for all of them."""
    return x.bfloat16() if torch.is_autocast_enabled(x.device.type) else x


# ---------------------------------------------------------------- text encoder


def position_buckets(model: UMT5EncoderModel, length: int) -> Tensor:
    """Which relative-position bias each pair of tokens has, [L, L]."""
    place = torch.arange(length, device=model.device)
    return model.encoder.block[0].layer[0].SelfAttention._relative_position_bucket(place[None] - place[:, None])


def encode_text(model: UMT5EncoderModel, ids: Tensor, lengths: Tensor, buckets: Tensor) -> Tensor:
    """Last hidden states [B, L, J] of captions `ids` [B, L], zero after their ends."""
    used = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    masked = (~used).float()[:, None, None] * -1e9
    # As a product of matrices: the gradient of a lookup may wait for the device, which a CUDA graph cannot.
    with torch.autocast(ids.device.type, enabled=False):
        x = (
            ids[:, :, None] == torch.arange(model.shared.num_embeddings, device=ids.device)
        ).float() @ model.shared.weight
    for block in model.encoder.block:
        attention, feed_forward = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        y = _rms(x, block.layer[0].layer_norm.weight, 1e-6)
        q, k, v = (
            p(y).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2) for p in (attention.q, attention.k, attention.v)
        )
        bias = attention.relative_attention_bias(buckets).permute(2, 0, 1)[None] + masked
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        x = x + attention.o(out.transpose(1, 2).flatten(2))
        y = _rms(x, block.layer[1].layer_norm.weight, 1e-6)
        x = x + feed_forward.wo(F.gelu(feed_forward.wi_0(y), approximate="tanh") * feed_forward.wi_1(y))
    x = _rms(x, model.encoder.final_layer_norm.weight, 1e-6)
    return x * used[:, :, None]


# ---------------------------------------------------------------- transformer


def rotary_tables(model: WanTransformer3DModel, frames: int = NUM_FRAMES) -> tuple[Tensor, Tensor]:
    """Cosine and sine [S, 1, HEAD_DIM / 2] of the tokens of a clip."""
    latents = torch.empty(1, LATENT_CHANNELS, frames, LATENT_SIDE, LATENT_SIDE, device=model.device)
    cos, sin = model.rope(latents)
    return cos[0, :, :, 0::2].float().contiguous(), sin[0, :, :, 1::2].float().contiguous()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, S, H, HEAD_DIM] by tables [S, 1, HEAD_DIM / 2]; neighbours form the pairs."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def _attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Queries [B, S, H, d], keys and values [B, T, H, d] to [B, S, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention.to_out[0](out.transpose(1, 2).flatten(2))


def _queries_and_keys(attention: nn.Module, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = _rms(attention.to_q(x), attention.norm_q.weight, attention.norm_q.eps)
    k = _rms(attention.to_k(text), attention.norm_k.weight, attention.norm_k.eps)
    q, k, v = (y.unflatten(-1, (attention.heads, -1)) for y in (q, k, attention.to_v(text)))
    return q, k, v


def _norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6)


def block_forward(
    block: nn.Module, x: Tensor, text: Tensor, mask: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """One block. x [B, S, D], text [B, L + 1, D], `mask` additive [B, 1, 1, L + 1], modulation [B, 6, D]."""
    table = (block.scale_shift_table + modulation).chunk(6, dim=1)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = table
    y = _narrow(torch.addcmul(shift, _norm(x), 1 + scale))
    q, k, v = _queries_and_keys(block.attn1, y, y)
    x = torch.addcmul(x, gate, _attend(block.attn1, _rotate(q, cos, sin), _rotate(k, cos, sin), v).float())
    q, k, v = _queries_and_keys(block.attn2, _narrow(_norm(x, block.norm2.weight, block.norm2.bias)), text)
    x = x + _attend(block.attn2, q, k, v, mask.to(q.dtype))
    y = _narrow(torch.addcmul(ff_shift, _norm(x), 1 + ff_scale))
    return torch.addcmul(x, ff_gate, block.ffn(y).float())


def predict(
    model: WanTransformer3DModel,
    latents: Tensor,
    text: Tensor,
    lengths: Tensor,
    sigma: Tensor,
    cos: Tensor,
    sin: Tensor,
    block_fn: Callable[..., Tensor] = block_forward,
) -> Tensor:
    """Velocity of `latents` [B, C, F, H, W] at `sigma` [B] in 0..1, told by `text` [B, L, J], zero after `lengths`."""
    embedder, length = model.condition_embedder, text.shape[1]
    x = model.patch_embedding(latents).flatten(2).transpose(1, 2).float()
    # The sinusoid stays in single precision: its fast waves would be lost in bfloat16.
    temb = embedder.time_embedder(embedder.timesteps_proj(1000 * sigma.float()))
    modulation = embedder.time_proj(F.silu(temb)).float().unflatten(1, (6, -1))
    text = embedder.text_embedder(F.pad(text, (0, 0, 0, 1)))
    unused = torch.arange(length, device=text.device) >= lengths[:, None]
    padding = (PADDED_TEXT - lengths).float().log()[:, None]
    mask = torch.cat((unused.float() * -1e9, padding), dim=1)[:, None, None]
    for block in model.blocks:
        x = block_fn(block, x, text, mask, modulation, cos, sin)
    shift, scale = (model.scale_shift_table + temb[:, None]).chunk(2, dim=1)
    x = model.proj_out(_norm(x) * (1 + scale) + shift)
    rows = LATENT_SIDE // 2
    x = x.unflatten(1, (-1, rows, rows)).unflatten(-1, (2, 2, -1))
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
