"""Qwen-Image (arXiv:2508.02324): text to image, editing, and layers."""

from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image import (
    QwenImagePipeline,
    get_qwen_image_post_process_func,
)
from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image_edit import (
    QwenImageEditPipeline,
    get_qwen_image_edit_post_process_func,
    get_qwen_image_edit_pre_process_func,
)
from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image_edit_plus import (
    QwenImageEditPlusPipeline,
    get_qwen_image_edit_plus_post_process_func,
    get_qwen_image_edit_plus_pre_process_func,
)
from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image_layered import (
    QwenImageLayeredPipeline,
    get_qwen_image_layered_post_process_func,
    get_qwen_image_layered_pre_process_func,
)
from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import QwenImageTransformer2DModel

__all__ = [
    "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline",
    "QwenImageLayeredPipeline",
    "QwenImagePipeline",
    "QwenImageTransformer2DModel",
    "get_qwen_image_edit_plus_post_process_func",
    "get_qwen_image_edit_plus_pre_process_func",
    "get_qwen_image_edit_post_process_func",
    "get_qwen_image_edit_pre_process_func",
    "get_qwen_image_layered_post_process_func",
    "get_qwen_image_layered_pre_process_func",
    "get_qwen_image_post_process_func",
]
