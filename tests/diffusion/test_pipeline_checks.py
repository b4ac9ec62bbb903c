"""An option that would change nothing of a pipeline is an error, before its weights are read."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from tests.tiny_flux import autoencoder_kl
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.groups import NO_GROUPS, ParallelGroups, TensorParallelRank
from vllm_omni.diffusion.model_loader.components import decode_in_parts
from vllm_omni.diffusion.worker.out_of_memory import explained
from vllm_omni.diffusion.worker.pipeline_checks import check_pipeline
from vllm_omni.errors import FeatureNotAvailableError


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("attention_backend", "TORCH_SDPA"),
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
    config = _configuration(**{option: value})
    groups = ParallelGroups(
        tp=TensorParallelRank(0, config.parallel_config.tensor_parallel_size),
        sequence=TensorParallelRank(0, config.parallel_config.ulysses_degree),
    )
    with pytest.raises(FeatureNotAvailableError, match=rf"{option}.*Sequential.*leave the option"):
        check_pipeline(nn.Sequential(nn.Linear(4, 4)), config, groups)


@pytest.mark.parametrize("option", ["use_slicing", "use_tiling"])
def test_slices_and_tiles_reach_an_autoencoder_that_the_pipeline_loaded_itself(option):
    pipeline = nn.Module()
    pipeline.vae = autoencoder_kl()
    decode_in_parts(pipeline, _configuration())
    assert not getattr(pipeline.vae, option)
    decode_in_parts(pipeline, _configuration(**{f"vae_{option}": True}))
    assert [name for name in ("use_slicing", "use_tiling") if getattr(pipeline.vae, name)] == [option]


@pytest.mark.parametrize("option", ["vae_use_slicing", "vae_use_tiling"])
def test_a_pipeline_without_an_autoencoder_that_can_refuses_slices_and_tiles(option):
    with pytest.raises(FeatureNotAvailableError, match=rf"{option}=True: Linear has no autoencoder.*leave the option"):
        _load_and_check(nn.Linear(1, 1), _configuration(**{option: True}))


def test_ranks_that_could_share_no_tiles_are_refused():
    with pytest.raises(FeatureNotAvailableError, match=r"vae_parallel_size=2: Linear has no autoencoder.*leave the"):
        _load_and_check(nn.Linear(1, 1), _configuration(), ParallelGroups(vae=TensorParallelRank(0, 2)))


def test_a_failed_step_keeps_no_tensors_of_its_forward():
    held = []

    def forward():
        tensor = torch.zeros(4)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("no memory")

    try:
        forward()
    except torch.OutOfMemoryError as error:
        advised = explained(error)
    assert "ran out of memory" in str(advised)
    assert advised.__cause__.__traceback__ is not None, "the lines can still be told"
    assert held[0]() is None


def _load_and_check(pipeline, config, groups=NO_GROUPS):
    """In the order of the loader."""
    decode_in_parts(pipeline, config)
    check_pipeline(pipeline, config, groups)


def _configuration(**options):
    return OmniDiffusionConfig.from_options(model="m", model_class_name="", device="cpu", **options)
