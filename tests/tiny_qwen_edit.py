"""Tiny random checkpoints of the Qwen-Image family that start from pictures, in the folder layout of the real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageLayeredPipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor

from tests.tiny import QWEN_TEMPLATE, initialize, qwen_text_encoder, qwen_tokenizer

EDIT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects,"
    " background), then explain how the user's text instruction should alter or modify the image. Generate a new image"
    " that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
)
_CAPTIONS = ["make the circle blue", "turn this cat into a dog that holds a sign", "Picture 1: the hat of Picture 2: "]
_SCHEDULER = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 8192, "max_shift": 0.9}


def picture(width: int, height: int, *, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Soft blots of colour."""
    blots = np.random.default_rng(seed).integers(0, 256, (5, 7, len(mode)), dtype=np.uint8)
    return Image.fromarray(blots).resize((width, height))


def qwen_image_edit(folder: Path, *, seed: int = 0) -> Path:
    """Qwen-Image-Edit: a transformer of text to image, and an encoder that sees."""
    tokenizer = qwen_tokenizer([EDIT_TEMPLATE, *_CAPTIONS])
    return _save(QwenImageEditPipeline, folder, tokenizer, seed, {"shift_terminal": 0.02, **_SCHEDULER})


def qwen_image_edit_plus(folder: Path, *, seed: int = 0, zero_cond_t: bool = True) -> Path:
    """Qwen-Image-Edit-2511; without ``zero_cond_t``, -2509."""
    tokenizer = qwen_tokenizer([EDIT_TEMPLATE, *_CAPTIONS])
    scheduler = {"shift_terminal": 0.02, **_SCHEDULER}
    return _save(QwenImageEditPlusPipeline, folder, tokenizer, seed, scheduler, zero_cond_t=zero_cond_t)


def qwen_image_layered(folder: Path, *, seed: int = 0) -> Path:
    """Qwen-Image-Layered: an autoencoder of RGBA pictures."""
    return _save(
        QwenImageLayeredPipeline,
        folder,
        qwen_tokenizer([QWEN_TEMPLATE, *_CAPTIONS]),
        seed,
        {"time_shift_type": "exponential"},
        # diffusers takes a picture with as many channels as latents for latents, so there must not be 4 of these.
        num_latent_channels=8,
        num_pixel_channels=4,
        use_additional_t_cond=True,
        use_layer3d_rope=True,
    )


def _save(
    pipeline_class: type[DiffusionPipeline],
    folder: Path,
    tokenizer: Qwen2Tokenizer,
    seed: int,
    scheduler: dict[str, object],
    *,
    num_latent_channels: int = 4,
    num_pixel_channels: int = 3,
    **variant: bool,
) -> Path:
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * num_latent_channels,
        out_channels=num_latent_channels,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        **variant,
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=num_latent_channels,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        input_channels=num_pixel_channels,
        latents_mean=[0.1, -0.2, 0.3, 0.0, 0.2, -0.1, 0.0, 0.1][:num_latent_channels],
        latents_std=[1.5, 0.8, 1.1, 2.0, 1.2, 0.9, 1.0, 1.3][:num_latent_channels],
    )
    text_encoder = qwen_text_encoder(tokenizer)
    text_encoder.config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    text_encoder.config.vision_start_token_id = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    text_encoder.config.vision_end_token_id = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    # A caption of random weights would never end: let every twentieth token end it.
    text_encoder.generation_config.eos_token_id = list(range(0, len(tokenizer), 20))
    text_encoder.generation_config.pad_token_id = 0
    pipeline = pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **scheduler),
        vae=initialize(vae, seed),
        text_encoder=initialize(text_encoder, seed + 1),
        tokenizer=tokenizer,
        processor=None,
        transformer=initialize(transformer, seed + 2),
    )
    pipeline.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder / "processor")
    return folder


class ProcessorWithoutVideo(Qwen2VLProcessor):
    """The processor of transformers, which insists on a video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type:
        return type(argument)


def reference_pipeline(pipeline_class: type[DiffusionPipeline], folder: Path, **options: object) -> DiffusionPipeline:
    """diffusers' pipeline of a folder that this module made."""
    processor = ProcessorWithoutVideo(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"),
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
    )
    pipeline = pipeline_class.from_pretrained(folder, processor=processor, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
