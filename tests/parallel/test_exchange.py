"""Ranks of Ulysses that write to each other's memory exchange the very bits that collectives exchange."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch

from benchmarks.rank_pool import RankPool
from tests.parallel.toy_transformer import FileMemory, with_peers
from vllm_omni.diffusion.attention.exchange import heads_for_tokens, tokens_for_heads
from vllm_omni.diffusion.distributed.groups import build_groups
from vllm_omni.diffusion.distributed.layout import ParallelLayout
from vllm_omni.diffusion.distributed.peer_memory import carries
from vllm_omni.diffusion.distributed.sequence_parallel import shard_lengths

# Batch, text tokens, tokens of each rank, query heads, key/value heads, head size, dtype. In turn, so that an exchange
# follows one of another shape.
SMALL = [
    (1, 0, (5, 4), 4, 4, 16, torch.bfloat16),
    (2, 3, (4, 5), 3, 3, 8, torch.float32),
    (2, 7, (6, 6), 8, 4, 12, torch.bfloat16),  # rows of 24 bytes, which do not move by 16
]
LARGE = [
    *SMALL,
    (1, 512, (4096, 4096), 24, 24, 128, torch.bfloat16),
    (2, 77, (1023, 1022), 5, 5, 64, torch.float32),
    (1, 128, (8192, 8191), 24, 8, 128, torch.bfloat16),
]


def inputs_of(shape, seed, device):
    batch, num_text, lengths, heads, kv_heads, head_size, dtype = shape
    generator = torch.Generator(device).manual_seed(seed)
    own = num_text + lengths[torch.distributed.get_rank()]
    return [
        torch.randn(batch, own, count, head_size, device=device, generator=generator).to(dtype)
        for count in (heads, kv_heads, kv_heads)
    ]


def exchanged(inputs, shape, group):
    """What a rank has of the heads, and of the tokens after the way back."""
    _, num_text, lengths, heads, kv_heads, _, _ = shape
    by_rank, kv_by_rank = shard_lengths(heads, group.size), shard_lengths(kv_heads, group.size)
    wait_for_other(group, 0)
    there = tokens_for_heads(*inputs, num_text, lengths, by_rank, kv_by_rank, group)
    kept = [x.clone() for x in there]
    wait_for_other(group, 1)
    return [*kept, heads_for_tokens(there[0], num_text, lengths, by_rank, group)]


def wait_for_other(group, turn):
    """Let this rank's GPU be late by some tens of microseconds every other time, the other one's in between."""
    if torch.cuda.is_available() and group.peers is not None and group.rank == turn:
        torch.cuda._sleep(100_000)


@torch.inference_mode()
def count_differences(device_type, shapes, num_rounds, folder=None):
    """How many tensors differ, of how many: as they are called and, on GPUs, as CUDA graphs."""
    with mock.patch.dict(os.environ, VLLM_OMNI_PEER_MEMORY="1"):
        groups = build_groups(ParallelLayout(ulysses=2), device_type)
    peers = (groups if folder is None else with_peers(groups, folder)).ulysses
    assert peers.peers is not None, "these GPUs do not reach each other's memory"
    collective = replace(peers, peers=None)
    device = torch.device(device_type, torch.cuda.current_device() if device_type == "cuda" else None)
    rounds = [(shape, 2 * index + peers.rank) for index in range(num_rounds) for shape in shapes]
    found = [exchanged(inputs_of(shape, seed, device), shape, peers) for shape, seed in rounds]
    if device_type == "cuda":
        found += replayed(rounds, shapes, peers, device)
        rounds = rounds + rounds
    differing = total = 0
    for (shape, seed), tensors in zip(rounds, found, strict=True):
        expected = exchanged(inputs_of(shape, seed, device), shape, collective)
        differing += sum(not torch.equal(ours, other) for ours, other in zip(tensors, expected, strict=True))
        total += len(expected)
    return differing, total


def replayed(rounds, shapes, group, device):
    """What graphs of :func:`exchanged` give, one for each shape."""
    graphs = {}
    for shape in shapes:
        inputs, graph = inputs_of(shape, 0, device), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = exchanged(inputs, shape, group)
        graphs[shape] = (graph, inputs, outputs)
    found = []
    for shape, seed in rounds:
        graph, inputs, outputs = graphs[shape]
        for target, source in zip(inputs, inputs_of(shape, seed, device), strict=True):
            target.copy_(source)
        graph.replay()
        found.append([x.clone() for x in outputs])
    return found


def test_shared_files_carry_the_bits_of_gloo(two_ranks, tmp_path):
    assert two_ranks.run(count_differences, "cpu", SMALL, 2, str(tmp_path)) == [(0, 24)] * 2


def finds_what_was_written(folder, *, astray):
    """What the check at the start says, of memory that carries and of memory that is each rank's own."""
    group = build_groups(ParallelLayout(ulysses=2), "cpu").ulysses
    memory = FileMemory(f"{folder}/{group.rank if astray else 'shared'}", group)
    return carries(memory, group.process_group)


@pytest.mark.parametrize("astray", [False, True])
def test_memory_that_does_not_carry_is_found_at_the_start(two_ranks, tmp_path, astray):
    for name in ("0", "1", "shared"):
        (tmp_path / name).mkdir()
    assert two_ranks.run(partial(finds_what_was_written, astray=astray), str(tmp_path)) == [not astray] * 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_memory_of_peers_carries_the_bits_of_nccl():
    pool = RankPool(2, "cuda", timeout_s=40, preload=[__name__])
    try:
        assert pool.run(count_differences, "cuda", LARGE, 8) == [(0, 2 * 8 * 6 * 4)] * 2
    finally:
        pool.close()
