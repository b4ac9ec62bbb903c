"""The layouts that tests run, by short names."""

from __future__ import annotations

from typing import Any

TWO: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel_size": 2},
    "u2": {"ulysses_degree": 2},
    "r2": {"ring_degree": 2},
    "cfg2": {"cfg_parallel_size": 2},
    "hsdp2": {"use_hsdp": True, "hsdp_shard_size": 2},
    "hsdp2-u2": {"use_hsdp": True, "ulysses_degree": 2},
}
FOUR: dict[str, dict[str, Any]] = {
    "u2-r2": {"ulysses_degree": 2, "ring_degree": 2},
    "u4": {"ulysses_degree": 4},
    "r4": {"ring_degree": 4},
    "tp4": {"tensor_parallel_size": 4},
    "cfg4": {"cfg_parallel_size": 4},
    "cfg2-tp2": {"cfg_parallel_size": 2, "tensor_parallel_size": 2},
    "cfg2-u2": {"cfg_parallel_size": 2, "ulysses_degree": 2},
    "cfg2-r2": {"cfg_parallel_size": 2, "ring_degree": 2},
    "u2-tp2": {"ulysses_degree": 2, "tensor_parallel_size": 2},
    "hsdp2-cfg2": {"use_hsdp": True, "hsdp_shard_size": 2, "cfg_parallel_size": 2},
    "hsdp4-u2-r2": {"use_hsdp": True, "ulysses_degree": 2, "ring_degree": 2},
}
TEACACHE = {"cache_backend": "tea_cache", "cache_config": {"rel_l1_thresh": 1.0, "coefficients": [0.2, 0.0]}}
DBCACHE = {"cache_backend": "cache_dit", "cache_config": {"max_warmup_steps": 1, "residual_diff_threshold": 5.0}}
