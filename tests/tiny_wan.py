"""Tiny random Wan checkpoints in every form: Wan 2.1, Wan 2.2 A14B and TI2V-5B, for text and image to video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny import initialize

NUM_CHANNELS = 4
_WORDS = "a red blue circle square cat dog holding sign that says hello left of small on yellow background blurry dark"


def wan_t2v(folder: Path, *, num_experts: int = 2, euler: bool = False, seed: int = 0) -> Path:
    """Text to video: two transformers that change at boundary_ratio 0.875 (Wan 2.2), or one (Wan 2.1)."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if euler else _unipc()
    pipeline = WanPipeline(
        **_text_parts(seed),
        vae=_vae(seed),
        scheduler=scheduler,
        transformer=_transformer(seed + 3),
        transformer_2=_transformer(seed + 4) if num_experts == 2 else None,
        boundary_ratio=0.875 if num_experts == 2 else None,
    )
    pipeline.save_pretrained(folder)
    return folder


def wan_ti2v(folder: Path, *, pipeline_class: Any = WanPipeline, seed: int = 0) -> Path:
    """TI2V-5B: a timestep per frame, and an autoencoder with patches of its own, 16 pixels per latent pixel."""
    pipeline = pipeline_class(
        **_text_parts(seed),
        vae=_vae(
            seed, z_dim=8, is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16
        ),
        scheduler=_unipc(),
        transformer=_transformer(seed + 3, in_channels=8, out_channels=8),
        expand_timesteps=True,
    )
    pipeline.save_pretrained(folder)
    return folder


def wan_i2v(folder: Path, *, num_experts: int = 2, seed: int = 0) -> Path:
    """Image to video: two transformers without an image encoder (Wan 2.2), or one with it (Wan 2.1)."""
    has_image_encoder = num_experts == 1
    channels = {"in_channels": 2 * NUM_CHANNELS + 4, "out_channels": NUM_CHANNELS}
    extra = {"image_dim": 32, "added_kv_proj_dim": 64} if has_image_encoder else {}
    pipeline = WanImageToVideoPipeline(
        **_text_parts(seed),
        vae=_vae(seed),
        scheduler=_unipc(),
        image_processor=_image_processor() if has_image_encoder else None,
        image_encoder=_image_encoder(seed + 5) if has_image_encoder else None,
        transformer=_transformer(seed + 3, **channels, **extra),
        transformer_2=None if has_image_encoder else _transformer(seed + 4, **channels),
        boundary_ratio=None if has_image_encoder else 0.875,
    )
    pipeline.save_pretrained(folder)
    return folder


def _text_parts(seed: int) -> dict[str, Any]:
    tokenizer = _tokenizer()
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return {"tokenizer": tokenizer, "text_encoder": initialize(UMT5EncoderModel(config), seed + 1)}


def _tokenizer() -> T5Tokenizer:
    pieces = ["▁" + word for word in _WORDS.split()] + [chr(code) for code in range(33, 127)] + ["▁"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(piece, -float(len(pieces)) / len(piece)) for piece in dict.fromkeys(pieces)]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def _vae(seed: int, **values: Any) -> AutoencoderKLWan:
    values.setdefault("z_dim", NUM_CHANNELS)
    vae = AutoencoderKLWan(
        base_dim=8,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0, 0.1, -0.2, 0.3, 0.0][: values["z_dim"]],
        latents_std=[1.5, 0.8, 1.1, 2.0, 1.5, 0.8, 1.1, 2.0][: values["z_dim"]],
        **values,
    )
    return initialize(vae, seed)


def _transformer(seed: int, **values: Any) -> WanTransformer3DModel:
    arguments = {"in_channels": NUM_CHANNELS, "out_channels": NUM_CHANNELS} | values
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        text_dim=32,
        freq_dim=32,
        ffn_dim=128,
        **arguments,
    )
    return initialize(transformer, seed)


def _unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def _image_encoder(seed: int) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    return initialize(CLIPVisionModel(config), seed)
