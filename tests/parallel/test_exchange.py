"""Ranks that use each other's memory have the very bits that they have by collectives."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch

from benchmarks.rank_pool import RankPool
from tests.parallel.toy_transformer import FileBuffer, FileMemory, with_peers
from vllm_omni.diffusion.attention.exchange import heads_for_tokens, tokens_for_heads
from vllm_omni.diffusion.attention.sequence_parallel import _pass_on, _pass_to_peer
from vllm_omni.diffusion.distributed.groups import ParallelGroups, RankGroup, TensorParallelRank, build_groups
from vllm_omni.diffusion.distributed.layout import ParallelLayout
from vllm_omni.diffusion.distributed.peer_memory import PeerMemory, carries, exchange_sequence
from vllm_omni.diffusion.distributed.sequence_parallel import shard_lengths
from vllm_omni.diffusion.layers.linear import RowParallelLinear, both_summed
from vllm_omni.diffusion.layers.peer_sums import sum_over_peers_op, summed_linear_op, summed_linears_op

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


def test_a_rank_tells_of_all_memory_that_others_write_to():
    memory = object.__new__(PeerMemory)
    memory._buffers = {"sums": [mock.Mock(num_bytes=1), mock.Mock(num_bytes=2)], "tokens": [mock.Mock(num_bytes=4)]}
    assert ParallelGroups(tp=TensorParallelRank(0, 2, peers=memory)).peer_bytes == 7
    assert ParallelGroups(ring=RankGroup(0, 2, peers=memory), ulysses=RankGroup(0, 2, peers=memory)).peer_bytes == 14
    assert ParallelGroups().peer_bytes == 0


def inputs_of(shape, seed, device):
    batch, num_text, lengths, heads, kv_heads, head_size, dtype = shape
    generator = torch.Generator(device).manual_seed(seed)
    own = num_text + lengths[torch.distributed.get_rank()]
    return [
        torch.randn(batch, own, count, head_size, device=device, generator=generator).to(dtype)
        for count in (heads, kv_heads, kv_heads)
    ]


def exchanged(inputs, shape, group):
    """What a rank of Ulysses has of the heads, and of the tokens after the way back."""
    _, num_text, lengths, heads, kv_heads, _, _ = shape
    by_rank, kv_by_rank = shard_lengths(heads, group.size), shard_lengths(kv_heads, group.size)
    wait_for_other(group, 0)
    there = tokens_for_heads(*inputs, num_text, lengths, by_rank, kv_by_rank, group)
    kept = [x.clone() for x in there]
    wait_for_other(group, 1)
    return [*kept, heads_for_tokens(there[0], num_text, lengths, by_rank, group)]


def passed(inputs, shape, group):
    """What comes to a rank of a ring in three turns: an odd number, so that turns of one graph meet those of others."""
    _, num_text, lengths, _, _, _, _ = shape
    pass_on = _pass_on if group.peers is None else _pass_to_peer
    came = []
    for turn in range(3):
        block = torch.stack([x[:, num_text:] + turn for x in inputs[1:]])
        wait_for_other(group, turn % 2)
        arrived = pass_on(block, lengths[1 - group.rank], max(lengths), group)
        came.append(arrived().clone())
    return came


def summed(inputs, shape, group):
    """Sums of tensor-parallel ranks: of a product, of numbers, of a product of two inputs, of two products."""
    _, num_text, lengths, _, _, _, dtype = shape
    x, more = (y[:, : num_text + min(lengths)].flatten(2) for y in inputs[:2])
    count = x.shape[-1] * (x.shape[-1] + more.shape[-1])
    numbers = torch.linspace(group.rank - 3, 2, count, device=x.device).sin().to(dtype)
    weight, bias = numbers.view(x.shape[-1], -1), numbers[: x.shape[-1]]
    own = weight[:, : x.shape[-1]]
    if group.peers is None:
        product = torch.addmm(bias, x.flatten(0, 1), own.t())
        of_two = torch.mm(x.flatten(0, 1), own.t()).addmm_(more.flatten(0, 1), weight[:, x.shape[-1] :].t())
        both = torch.cat([product, torch.addmm(bias + 1, x[:, 1:].flatten(0, 1), own.t())])
        return [added(y, group) for y in (product.view_as(x), x, of_two.view_as(x), both, -x)]
    sums = []
    for turn, one in enumerate(
        (
            lambda: summed_linear_op([x], own, bias, group.name),
            lambda: sum_over_peers_op(x, group.name),
            lambda: summed_linear_op([x, more], weight, None, group.name),
            lambda: summed_linears_op(x, own, bias, x[:, 1:], own, bias + 1, group.name),
            lambda: sum_over_peers_op(-x, group.name),
        )
    ):
        wait_for_other(group, turn % 2)
        sums.append(one())
    return sums


def added(x, group):
    parts = [torch.empty_like(x) for _ in range(group.size)]
    torch.distributed.all_gather(parts, x.contiguous(), group=group.process_group)
    return parts[0] + parts[1]


# What ranks of a group exchange, and how many tensors they then have.
KINDS = {"tp": (summed, 5), "ulysses": (exchanged, 4), "ring": (passed, 3)}


def wait_for_other(group, turn):
    """Let this rank's GPU be late by some tens of microseconds every other time, the other one's in between."""
    if torch.cuda.is_available() and group.peers is not None and group.rank == turn:
        torch.cuda._sleep(100_000)


@torch.inference_mode()
def count_differences(device_type, kind, shapes, num_rounds, folder=None):
    """How many tensors differ, of how many: as they are called, as sequences and, on GPUs, as CUDA graphs."""
    groups = build_groups(ParallelLayout(**{kind: 2}), device_type)
    peers = getattr(groups if folder is None else with_peers(groups, folder), kind)
    assert peers.peers is not None, "these GPUs do not reach each other's memory"
    exchange, _ = KINDS[kind]
    collective = replace(peers, peers=None)
    device = torch.device(device_type, torch.cuda.current_device() if device_type == "cuda" else None)
    rounds = [(shape, 2 * index + peers.rank) for index in range(num_rounds) for shape in shapes]
    found = [exchange(inputs_of(shape, seed, device), shape, peers) for shape, seed in rounds]
    if device_type == "cuda":
        found += replayed(exchange, rounds, shapes, peers, device)
    else:
        with exchange_sequence():
            found += [exchange(inputs_of(shape, seed, device), shape, peers) for shape, seed in rounds]
    differing = total = 0
    for (shape, seed), tensors in zip(rounds + rounds, found, strict=True):
        expected = exchange(inputs_of(shape, seed, device), shape, collective)
        differing += sum(not torch.equal(ours, other) for ours, other in zip(tensors, expected, strict=True))
        total += len(expected)
    return differing, total


def replayed(exchange, rounds, shapes, group, device):
    """What graphs of ``exchange`` give, one for each shape."""
    graphs = {}
    for shape in shapes:
        inputs, graph = inputs_of(shape, 0, device), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"), exchange_sequence():
            outputs = exchange(inputs, shape, group)
        graphs[shape] = (graph, inputs, outputs)
    found = []
    for shape, seed in rounds:
        graph, inputs, outputs = graphs[shape]
        for target, source in zip(inputs, inputs_of(shape, seed, device), strict=True):
            target.copy_(source)
        graph.replay()
        found.append([x.clone() for x in outputs])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_shared_files_carry_the_bits_of_gloo(two_ranks, tmp_path, kind):
    num_tensors = KINDS[kind][1] * len(SMALL) * 2 * 2
    assert two_ranks.run(count_differences, "cpu", kind, SMALL, 2, str(tmp_path)) == [(0, num_tensors)] * 2


def barriers_of_turns(folder):
    """Where turns lie that follow each other, apart, and in another sequence; and how many barriers they began with."""
    memory = FileMemory(folder, build_groups(ParallelLayout(tp=2), "cpu").tp)
    with mock.patch.object(FileBuffer, "barrier") as barrier:
        places = []
        for num_turns in (3, 2):
            with exchange_sequence():
                places.append([memory.turn("sums", 8) for _ in range(num_turns)])
        in_sequences = barrier.call_count
        places.append([memory.turn("sums", 8) for _ in range(2)])
        return (
            [[memory._buffers["sums-1"][0] is place for place in of] for of in places],
            in_sequences,
            barrier.call_count,
        )


def test_only_turns_that_follow_each_other_do_without_a_barrier_before_them(two_ranks, tmp_path):
    places = [[False, True, False], [False, True], [False, False]]
    assert two_ranks.run(barriers_of_turns, str(tmp_path)) == [(places, 2, 4)] * 2


def compiled_sum(folder):
    """Whether a compiled layer of two ranks gives what it gives eagerly by collectives, for two numbers of rows."""
    groups = build_groups(ParallelLayout(tp=2), "cpu")
    layers = []
    for given in (groups, with_peers(groups, folder)):
        layers.append(RowParallelLinear(8, 6, tp=given.tp))
        torch.nn.init.constant_(layers[-1].weight, 0.5 + groups.tp.rank)
        torch.nn.init.constant_(layers[-1].bias, 2.0 - groups.tp.rank)

    def run(layer, x, y):
        return (layer(x), *both_summed(layer, x, layer, y))

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = [torch.arange(4.0 * rows).view(1, rows, 4) for rows in (3, 5, 6)]
    pairs = []
    for x, y in itertools.pairwise(inputs):
        pairs += zip(compiled(layers[1], x, y), run(layers[0], x, y), strict=True)
    return len(pairs) == 6 and all(torch.equal(*pair) for pair in pairs)


def test_a_compiled_layer_sums_over_memory_of_peers(two_ranks, tmp_path):
    assert two_ranks.run(compiled_sum, str(tmp_path)) == [True] * 2


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
@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_peers_carries_the_bits_of_nccl(gpus, kind):
    num_tensors = KINDS[kind][1] * len(LARGE) * 8 * 2
    assert gpus.run(count_differences, "cuda", kind, LARGE, 8) == [(0, num_tensors)] * 2


@pytest.fixture
def gpus():
    pool = RankPool(2, "cuda", timeout_s=40, preload=[__name__])
    yield pool
    pool.close()
