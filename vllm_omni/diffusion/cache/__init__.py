"""Step caches: blocks of the transformer are skipped at steps that change little."""

from vllm_omni.diffusion.cache.apply import apply_cache, check_cache
from vllm_omni.diffusion.cache.extractors import EXTRACTOR_REGISTRY, register_extractor

__all__ = ["EXTRACTOR_REGISTRY", "apply_cache", "check_cache", "register_extractor"]
