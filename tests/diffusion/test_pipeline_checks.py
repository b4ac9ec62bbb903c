"""An option that would change nothing of a pipeline is an error, before its weights are read."""

from __future__ import annotations

import pytest
from torch import nn

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.groups import ParallelGroups, TensorParallelRank
from vllm_omni.diffusion.worker.pipeline_checks import check_pipeline
from vllm_omni.errors import FeatureNotAvailableError


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("attention_dtype", "fp8"),
        ("quantization", "fp8"),
        ("tensor_parallel_size", 2),
        ("use_hsdp", True),
        ("vae_use_tiling", True),
        ("vae_use_slicing", True),
        ("enforce_eager", False),
        ("ulysses_degree", 2),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(option, value):
    config = OmniDiffusionConfig.from_options(model="m", model_class_name="", device="cpu", **{option: value})
    groups = ParallelGroups(
        tp=TensorParallelRank(0, config.parallel_config.tensor_parallel_size),
        sequence=TensorParallelRank(0, config.parallel_config.ulysses_degree),
    )
    with pytest.raises(FeatureNotAvailableError, match=rf"{option}.*Sequential.*leave the option"):
        check_pipeline(nn.Sequential(nn.Linear(4, 4)), config, groups)
