"""What a rank has of a sequence, and plans as another package would write them."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from tests.parallel.toy_transformer import ToyTransformer, run_toy
from vllm_omni.diffusion.distributed.groups import ParallelGroups, RankGroup
from vllm_omni.diffusion.distributed.sequence_parallel import (
    SequenceParallelInput,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
    ShardedForward,
    shard_lengths,
)
from vllm_omni.diffusion.distributed.sequence_plan import check_sequence_plans
from vllm_omni.errors import FeatureNotAvailableError, InvalidConfigError


def forwards(size):
    groups = [ParallelGroups(sequence=RankGroup(rank, size)) for rank in range(size)]
    return [ShardedForward(group, {}, set()) for group in groups]


@pytest.mark.parametrize(("total", "size"), [(8, 2), (9, 2), (10, 4), (5, 4)])
def test_the_ranks_have_all_tokens_once_and_differ_by_one_at_most(total, size):
    x = torch.arange(total)[None]
    parts = [forward.split(x, 1, "x") for forward in forwards(size)]
    assert torch.equal(torch.cat(parts, 1), x)
    lengths = shard_lengths(total, size)
    assert [part.shape[1] for part in parts] == list(lengths)
    assert max(lengths) - min(lengths) <= 1


def test_text_stays_whole_before_the_part_of_the_sequence():
    x = torch.arange(11)
    parts = [forward.split_after_text(x, 0, 3, "x") for forward in forwards(2)]
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 7, 8, 9, 10]]


@pytest.mark.parametrize(("total", "groups", "size"), [(12, 3, 2), (12, 3, 4), (30, 5, 4), (15, 3, 2), (8, 8, 2)])
def test_values_of_runs_of_tokens_become_values_of_this_ranks_runs(total, groups, size):
    values = torch.arange(groups)[None]
    per_token = values.repeat_interleave(total // groups, 1)
    for forward in forwards(size):
        tokens = forward.split(torch.arange(total)[None], 1, "tokens")
        runs = forward.split(values, 1, "values")
        run = tokens.shape[1] // runs.shape[1]
        assert torch.equal(runs.repeat_interleave(run, 1)[0], per_token[0, tokens[0]])


def test_a_sequence_of_another_length_is_refused():
    forward = forwards(2)[0]
    forward.split(torch.zeros(1, 8), 1, "first")
    with pytest.raises(ValueError, match=r"second has length 7 along dimension 1.*has 8 tokens"):
        forward.split(torch.zeros(1, 7), 1, "second")


@pytest.mark.parametrize("total", [1, 2, 3])
def test_a_sequence_of_fewer_tokens_than_ranks_stays_whole_on_each(total):
    for forward in forwards(4):
        tokens, positions = torch.rand(1, total), torch.rand(1, total + 2)
        assert forward.split(tokens, 1, "tokens") is tokens
        assert torch.equal(forward.split_after_text(positions, 1, 2, "positions"), positions)
        assert forward.gather(tokens, 1) is tokens


INPUT = SequenceParallelInput(1, 3)
GATHER = {"proj_out": SequenceParallelOutput(1)}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"blockz.0": {"hidden_states": INPUT}, **GATHER}, r"names 'blockz\.0', which it has no module of"),
        ({"empty.*": {"hidden_states": INPUT}, **GATHER}, r"names 'empty\.\*', which matches no module"),
        (
            {"blocks.*": {"hidden": INPUT}, **GATHER},
            r"names 'hidden', which is no parameter of ToyBlock\.forward; it has hidden",
        ),
        (
            {"": {"hidden_states": SequenceParallelInput(split_dim=3, expected_dims=3)}, **GATHER},
            "dimension 3 does not exist",
        ),
        (
            {"": {"hidden_states": INPUT}, "proj_out": SequenceParallelOutput(gather_dim=4, expected_dims=3)},
            "dimension 4 does not exist",
        ),
        (
            {"proj_in": {"x": SequenceParallelInput(split_dim=1, split_output=True)}, **GATHER},
            "must be the index of an output",
        ),
        (
            {"": {"hidden_states": INPUT}, "proj_out": {"x": SequenceParallelOutput(1)}},
            "'x' is changed where it comes out, so it must be the index of an output",
        ),
        ({"": {"hidden_states": SequenceParallelInput("1")}, **GATHER}, "dimension '1' must be an integer"),
        (
            {"": {"hidden_states": SequenceParallelPartialInput(1, -3)}, **GATHER},
            "text_len_source -3 must be a number of at least 0",
        ),
        ({"loose": {"args": INPUT}, **GATHER}, r"Loose\.forward takes \*args, which have no names"),
        (GATHER, "has no SequenceParallelInput: it must say where the sequence is split"),
        ({"": {"hidden_states": INPUT}}, "has no SequenceParallelOutput"),
        (
            {"": {"hidden_states": SequenceParallelPartialInput(split_dim=1, text_len_source="nowhere")}, **GATHER},
            "text_len_source='nowhere' is a parameter of neither",
        ),
        ({"": {"hidden_states": 1}, **GATHER}, "must be one of SequenceParallelInput"),
    ],
)
def test_a_plan_that_names_what_is_not_there_is_refused_at_start(plan, message):
    class Loose(nn.Module):
        def forward(self, *args):
            return args

    class Planned(ToyTransformer):
        _sp_plan = plan

    planned = Planned()
    planned.loose = Loose()
    with pytest.raises(InvalidConfigError, match=message):
        check_sequence_plans(nn.ModuleList([planned]))


def test_an_argument_that_a_module_takes_among_others_may_be_named():
    class Open(nn.Module):
        def forward(self, **kwargs):
            return kwargs

    class Planned(ToyTransformer):
        _sp_plan: ClassVar = {"open": {"hidden_states": INPUT}, **GATHER}

    planned = Planned()
    planned.open = Open()
    check_sequence_plans(nn.ModuleList([planned]))


def test_a_pipeline_without_a_plan_is_refused():
    with pytest.raises(FeatureNotAvailableError, match="declares a _sp_plan"):
        check_sequence_plans(nn.ModuleList([nn.Linear(2, 2)]))


@pytest.mark.parametrize("kind", ["whole sequence", "text in front", "split at each block", "wrong dims"])
@pytest.mark.parametrize("ring", [1, 2], ids=["ulysses", "ring"])
def test_plans_of_the_guide_work_on_a_transformer_that_knows_nothing_of_ranks(two_ranks, kind, ring):
    for answer in two_ranks.run(run_toy, kind, ring, 2 // ring):
        if kind == "wrong dims":
            assert "expected_dims is 4" in answer[0]
            continue
        assert_same(*answer)


@pytest.mark.parametrize("ring", [1, 2])
@pytest.mark.parametrize("kind", ["whole sequence", "text in front"])
def test_ranks_that_write_to_each_others_memory_exchange_the_same(two_ranks, tmp_path, kind, ring):
    for answer in two_ranks.run(run_toy, kind, ring, 2 // ring, str(tmp_path)):
        assert_same(*answer)


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("ring", "ulysses", "peers"),
    [(2, 2, False), (4, 1, False), (1, 4, False), (2, 2, True), (4, 1, True), (1, 4, True)],
)
def test_more_ranks_exchange_the_same(four_ranks, tmp_path, ring, ulysses, peers):
    for answer in four_ranks.run(run_toy, "text in front", ring, ulysses, str(tmp_path) if peers else None):
        assert_same(*answer)


def assert_same(error, ours, expected, tokens):
    assert error is None
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert tokens < expected.shape[1], "nothing was split"
