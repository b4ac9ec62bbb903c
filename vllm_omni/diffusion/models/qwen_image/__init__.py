"""Qwen-Image (arXiv:2508.02324)."""

from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image import (
    QwenImagePipeline,
    get_qwen_image_post_process_func,
)
from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import QwenImageTransformer2DModel

__all__ = ["QwenImagePipeline", "QwenImageTransformer2DModel", "get_qwen_image_post_process_func"]
