"""Which rank computes which row, and the guide's mixin for pipelines that run their own loop."""

from __future__ import annotations

import pytest
import torch

from tests.parallel.generation import groups_of
from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin, owned_outputs, owner_of
from vllm_omni.diffusion.distributed.groups import RankGroup, parallel_groups
from vllm_omni.diffusion.distributed.layout import ParallelLayout


@pytest.mark.parametrize(
    ("num_outputs", "num_branches", "size"), [(1, 2, 2), (3, 2, 2), (1, 3, 2), (5, 1, 4), (1, 1, 4)]
)
def test_every_row_has_one_owner_and_they_share_alike(num_outputs, num_branches, size):
    owned = []
    for rank in range(size):
        group = RankGroup(rank, size)
        rows = [
            (branch, output)
            for branch in range(num_branches)
            for output in owned_outputs("request", branch, num_outputs, num_branches, group)
        ]
        owned.append(rows)
    everything = [row for rows in owned for row in rows]
    assert sorted(everything) == [(b, o) for b in range(num_branches) for o in range(num_outputs)]
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


def test_branches_of_two_go_to_two_ranks_and_single_rows_to_any():
    assert {owner_of("request", row, 2, 2) for row in range(2)} == {0, 1}
    assert {owner_of(f"request-{index}", 0, 1, 2) for index in range(20)} == {0, 1}


class Looping(CFGParallelMixin):
    """A pipeline of one forward that counts its calls."""

    def __init__(self):
        self.calls = 0
        self.transformer = self.predict

    def predict(self, x, bias):
        self.calls += 1
        return (x * x + bias,)


def run_mixin(guided, normalize):
    groups = groups_of(ParallelLayout(cfg=2), "cpu", False)
    x = torch.linspace(-1, 2, 12).view(1, 4, 3)
    arguments = (guided, 4.0, {"x": x, "bias": 0.5}, {"x": x, "bias": -1.0} if guided else None)
    alone, together = Looping(), Looping()
    expected = alone.predict_noise_maybe_with_cfg(*arguments, cfg_normalize=normalize, output_slice=3)
    with parallel_groups(groups):
        ours = together.predict_noise_maybe_with_cfg(*arguments, cfg_normalize=normalize, output_slice=3)
    return ours, expected, together.calls, alone.calls


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("guided", [True, False])
def test_the_mixin_computes_one_branch_per_rank_and_combines_on_each(two_ranks, guided, normalize):
    for ours, expected, calls, calls_alone in two_ranks.run(run_mixin, guided, normalize):
        assert torch.equal(ours, expected)
        assert calls == 1
        assert calls_alone == 1 + guided
