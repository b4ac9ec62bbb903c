"""What only a forward shows of a plan or of a mask is an error at the start, by a trial of the smallest size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.parallel.toy_transformer import ToyTransformer
from vllm_omni import Omni
from vllm_omni.diffusion.attention.sequence_parallel import split_attention
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.distributed.groups import ParallelGroups, RankGroup
from vllm_omni.diffusion.distributed.sequence_hooks import apply_sequence_plans
from vllm_omni.diffusion.distributed.sequence_parallel import (
    SequenceParallelInput,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
    ShardedForward,
)
from vllm_omni.diffusion.engine import warm_up
from vllm_omni.diffusion.engine.engine import Engine
from vllm_omni.diffusion.registry import register_diffusion_model
from vllm_omni.errors import FeatureNotAvailableError, InvalidConfigError, InvalidRequestError, RankFailureError

GROUPS = ParallelGroups(ring=RankGroup(0, 2), sequence=RankGroup(0, 2))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("MaskOfPairs", FeatureNotAvailableError, r"ring_degree=2: .* mask of shape \[2, 1, .*masks of keys alone"),
        pytest.param(
            "WrongDims",
            InvalidConfigError,
            r"output 0 of .* has shape \[2, .*expected_dims is 4",
            marks=pytest.mark.parallel,
        ),
        pytest.param(
            "NoStart",
            RankFailureError,
            r"rank \d of 2 failed while it started: ArithmeticError: this model cannot be built",
            marks=pytest.mark.parallel,
        ),
        pytest.param(
            "NoSuchDimension", InvalidConfigError, r"output 0 of .* no dimension 3", marks=pytest.mark.parallel
        ),
        pytest.param(
            "UnsplitPositions",
            InvalidConfigError,
            r"as the model's _sp_plan says failed in a trial: RuntimeError: The size of tensor",
            marks=pytest.mark.parallel,
        ),
    ],
)
def test_a_model_that_cannot_be_split_is_refused_at_start(folder_of_class, name, kind, message):
    register_diffusion_model(
        name, f"tests.parallel.misplanned:{name}", post_process_func="get_misplanned_post_process_func"
    )
    with pytest.raises(kind, match=message):
        Omni(str(folder_of_class(name)), device="cpu", ring_degree=2)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"hidden_states": SequenceParallelInput(1, 4)}, r"hidden_states of Planned has shape .*expected_dims is 4"),
        ({"hidden_states": SequenceParallelInput(3)}, r"hidden_states of Planned has shape .* no dimension 3"),
        ({"hidden_states": SequenceParallelInput(-4)}, "no dimension -4"),
        ({"num_text": SequenceParallelInput(0)}, "num_text of Planned is no tensor but int"),
        (
            {"hidden_states": SequenceParallelPartialInput(1, 12)},
            "length 9 along dimension 1, of which 12 are text",
        ),
    ],
)
def test_a_plan_that_does_not_fit_its_tensors_is_an_error_that_names_them(plan, message):
    with pytest.raises(InvalidConfigError, match=message) as caught:
        toy({"": plan, "proj_out": SequenceParallelOutput(1)})
    assert caught.value.option == "ulysses_degree"


def test_an_output_that_is_not_there_is_an_error_that_says_how_many_are():
    split = {"proj_in": {1: SequenceParallelInput(1, split_output=True)}, "proj_out": SequenceParallelOutput(1)}
    with pytest.raises(InvalidConfigError, match="there is no output 1 of Linear, which returns 1"):
        toy(split)


def toy(plan):
    class Planned(ToyTransformer):
        _sp_plan = plan

    planned = Planned()
    apply_sequence_plans(planned, GROUPS)
    return planned(torch.zeros(1, 9, 4), torch.zeros(1, 9, 120), 0)


def attend(mask):
    forward = ShardedForward(GROUPS, {}, set())
    forward.split(torch.zeros(1, 9), 1, "tokens")
    heads = torch.zeros(1, 5 + 3, 2, 4)  # 3 of text
    split_attention(
        forward, heads, heads, heads, softmax_scale=1.0, causal=False, attn_mask=mask, requested_backend=None
    )


def test_a_mask_that_does_not_mask_keys_is_refused():
    with pytest.raises(FeatureNotAvailableError, match=r"ulysses_degree=1, ring_degree=2: .* \[1, 1, 12, 12\]"):
        attend(torch.ones(1, 1, 12, 12, dtype=torch.bool))
    with pytest.raises(InvalidConfigError, match=r"\[1, 7\]; it must mask 3 tokens of text and 9"):
        attend(torch.ones(1, 7, dtype=torch.bool))


@pytest.fixture
def tried(qwen_omni, monkeypatch):
    """A function that tries a split of the tiny Qwen-Image with an error as outcome, and returns the requests."""
    requests = []

    def attempt(error, **sizes):
        def try_step(engine, given):
            requests[:] = given
            return [] if error is None else [error]

        monkeypatch.setattr(Engine, "try_step", try_step)
        config = SimpleNamespace(parallel_config=DiffusionParallelConfig(**sizes))
        monkeypatch.setattr(qwen_omni._engine, "od_config", config)
        warm_up._try_split(qwen_omni._engine)
        return requests

    return attempt


def test_a_trial_has_a_token_for_each_rank_and_texts_of_different_lengths(tried):
    first, second = tried(None, ulysses_degree=2, ring_degree=3)
    params = first.sampling_params
    assert (params.height // 16) * (params.width // 16) >= 6
    assert params.num_inference_steps == 1
    assert len(str(first.prompt["prompt"])) < len(str(second.prompt["prompt"]))
    assert len(tried(None, ulysses_degree=2, cfg_parallel_size=2, data_parallel_size=2)) == 8


def test_one_rank_alone_is_not_tried(tried):
    assert tried(ArithmeticError("no trial"), cfg_parallel_size=2) == []


def test_what_a_trial_fails_with_says_what_to_look_at(tried, monkeypatch, qwen_omni, caplog):
    with pytest.raises(InvalidConfigError, match=r"ulysses_degree=2, ring_degree=1: .*ArithmeticError: sizes differ"):
        tried(ArithmeticError("sizes differ"), ulysses_degree=2)
    with pytest.raises(FeatureNotAvailableError, match="no masks"):
        tried(FeatureNotAvailableError("no masks"), ulysses_degree=2)
    # That the model does not take such a request says nothing of its plan.
    tried(InvalidRequestError("too small", param="height"), ulysses_degree=2)
    assert "a trial failed (too small)" in caplog.text
    monkeypatch.setattr(qwen_omni._engine, "_spec", None)
    tried(KeyError("image"), ulysses_degree=2)
    assert "a trial failed ('image')" in caplog.text
