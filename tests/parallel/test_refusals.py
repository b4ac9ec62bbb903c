"""Layouts that cannot be are refused at start, by what is wrong and what would be right. No process is started."""

from __future__ import annotations

import pytest
import torch

from vllm_omni import Omni
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.distributed.groups import ParallelGroups, RankGroup, TensorParallelRank, parallel_groups
from vllm_omni.diffusion.distributed.layout import check_layout
from vllm_omni.diffusion.engine.configure import configure
from vllm_omni.errors import FeatureNotAvailableError, InvalidConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0 must be an integer of at least 1"),
        ({"ulysses_degree": -2}, "ulysses_degree=-2 must be"),
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size=0 must be"),
        ({"ring_degree": True}, "ring_degree=True must be"),
        ({"cfg_parallel_size": "2"}, "cfg_parallel_size='2' must be"),
        ({"distributed_executor_backend": "threads"}, "must be one of mp, ray"),
        (
            {"tensor_parallel_size": 3},
            r"tensor_parallel_size=3 does not divide num_attention_heads=4.*these would: \[1, 2, 4\]",
        ),
        ({"ulysses_degree": 5}, "ulysses_degree=5 must be at most 4.*ring_degree for the rest"),
        ({"ulysses_degree": 4, "tensor_parallel_size": 2}, "must be at most 2: num_attention_heads=4"),
        ({"use_hsdp": True}, "needs ranks to hold the parts.*hsdp_shard_size"),
        ({"hsdp_shard_size": 2}, "hsdp_shard_size=2 goes with use_hsdp=True"),
        (
            {"use_hsdp": True, "ulysses_degree": 2, "hsdp_shard_size": 3},
            "must equal ring_degree x ulysses_degree = 1 x 2 = 2",
        ),
        ({"vae_parallel_size": 2, "cfg_parallel_size": 2}, "vae_use_tiling=True on different ranks; set it"),
        (
            {"vae_parallel_size": 3, "cfg_parallel_size": 2, "vae_use_tiling": True},
            r"must be at most 2, the number of ranks \(cfg_parallel_size=2\)",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_what_would(qwen_folder, options, message):
    with pytest.raises(InvalidConfigError, match=message) as caught:
        Omni(str(qwen_folder), device="cpu", **options)
    assert caught.value.option in options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2: blocks are not spread.*data_parallel_size for"),
        ({"use_hsdp": True, "hsdp_shard_size": 2, "tensor_parallel_size": 2}, "both split the same weights"),
        ({"use_hsdp": True, "hsdp_shard_size": 2, "quantization": "fp8"}, "scales of a weight do not travel"),
        ({"ulysses_degree": 2, "attention_dtype": "fp8"}, "ulysses_degree=2, ring_degree=1: ranks that share a seq"),
    ],
)
def test_features_that_exclude_each_other_are_refused_with_the_reason(qwen_folder, options, message):
    with pytest.raises(FeatureNotAvailableError, match=message):
        Omni(str(qwen_folder), device="cpu", **options)


@pytest.mark.parametrize("option", ["data_parallel_size", "cfg_parallel_size"])
def test_more_ranks_than_a_cpu_can_hold_are_refused_with_their_number(qwen_folder, option):
    with pytest.raises(
        InvalidConfigError, match=rf"{option}=1000 makes 1000 ranks, and at most \d+ may share"
    ) as caught:
        Omni(str(qwen_folder), device="cpu", **{option: 1000})
    assert caught.value.option == option


def test_more_ranks_than_gpus_are_refused_with_their_number(qwen_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InvalidConfigError, match=r"ulysses_degree=2 x tensor_parallel_size=2 needs 4 GPUs, .* has 2"):
        Omni(str(qwen_folder), device="cuda", dtype="float32", ulysses_degree=2, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduling_policy": "shortest"}, "scheduling_policy='shortest' goes by times"),
        ({"distributed_executor_backend": "ray"}, "torchrun has started the ranks"),
    ],
)
def test_what_processes_of_torchrun_could_not_agree_on_is_refused(qwen_folder, monkeypatch, options, message):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InvalidConfigError, match=message) as caught:
        Omni(str(qwen_folder), device="cpu", cfg_parallel_size=2, **options)
    assert caught.value.option in options


def test_of_ranks_of_torchrun_those_of_this_machine_must_find_room_on_it(qwen_folder, monkeypatch):
    config = configure(str(qwen_folder), {"device": "cpu", "cfg_parallel_size": 1000})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert check_layout(config).world_size == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    with pytest.raises(InvalidConfigError, match="makes 1000 ranks"):
        check_layout(config)


def test_ray_chooses_the_gpus(monkeypatch, qwen_folder):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InvalidConfigError, match=r"device='cuda:1' with .*Ray chooses the GPU") as caught:
        Omni(str(qwen_folder), device="cuda:1", dtype="float32", distributed_executor_backend="ray")
    assert caught.value.option == "device"


def test_a_ring_takes_no_causal_attention():
    with parallel_groups(ParallelGroups(ring=RankGroup(0, 2), sequence=RankGroup(0, 2))):
        Attention(2, 8)
        with pytest.raises(FeatureNotAvailableError, match=r"ring_degree=2.*cannot mask causally; use ulysses_degree"):
            Attention(2, 8, causal=True)


def test_a_width_that_does_not_divide_says_what_would():
    with pytest.raises(InvalidConfigError, match=r"inner_size=6 does not divide by tensor_parallel_size=4.*\[1, 2, 3"):
        TensorParallelRank(0, 4).divide(6, "inner_size")
