"""FLUX.1 (https://bfl.ai) text to image, and FLUX.1 Kontext (arXiv:2506.15742)."""

from vllm_omni.diffusion.models.flux.flux_transformer import FluxTransformer2DModel
from vllm_omni.diffusion.models.flux.pipeline_flux import FluxPipeline, get_flux_post_process_func
from vllm_omni.diffusion.models.flux.pipeline_flux_kontext import (
    FluxKontextPipeline,
    get_flux_kontext_post_process_func,
    get_flux_kontext_pre_process_func,
)

__all__ = [
    "FluxKontextPipeline",
    "FluxPipeline",
    "FluxTransformer2DModel",
    "get_flux_kontext_post_process_func",
    "get_flux_kontext_pre_process_func",
    "get_flux_post_process_func",
]
