"""Wan 2.1 and 2.2 (arXiv:2503.20314)."""

from vllm_omni.diffusion.models.wan2_2.pipeline_wan2_2 import (
    WanPipeline,
    get_wan_post_process_func,
    get_wan_pre_process_func,
)
from vllm_omni.diffusion.models.wan2_2.pipeline_wan2_2_i2v import (
    WanImageToVideoPipeline,
    get_wan_i2v_post_process_func,
    get_wan_i2v_pre_process_func,
)
from vllm_omni.diffusion.models.wan2_2.wan2_2_transformer import WanTransformer3DModel

__all__ = [
    "WanImageToVideoPipeline",
    "WanPipeline",
    "WanTransformer3DModel",
    "get_wan_i2v_post_process_func",
    "get_wan_i2v_pre_process_func",
    "get_wan_post_process_func",
    "get_wan_pre_process_func",
]
