"""A transformer in the manner of the model guide: a forward, blocks, our attention, no StagedForward."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from tests.parallel.generation import groups_of
from vllm_omni.diffusion.attention.layer import Attention, AttentionMetadata
from vllm_omni.diffusion.distributed.groups import parallel_groups
from vllm_omni.diffusion.distributed.layout import ParallelLayout
from vllm_omni.diffusion.distributed.peer_memory import PeerMemory
from vllm_omni.diffusion.distributed.sequence_hooks import apply_sequence_plans
from vllm_omni.diffusion.distributed.sequence_parallel import (
    SequenceParallelInput,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
)

NUM_TEXT, NUM_IMAGE, HEADS, HEAD_SIZE = 3, 9, 5, 8  # neither tokens nor heads divide by two
WIDTH = HEADS * HEAD_SIZE


class ToyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.attn = Attention(HEADS, HEAD_SIZE)
        self.tokens = 0

    def forward(self, hidden_states, positions, mask=None):
        self.tokens = hidden_states.shape[1]
        heads = (x.unflatten(-1, (HEADS, HEAD_SIZE)) for x in (self.qkv(hidden_states) + positions).chunk(3, -1))
        return hidden_states + self.attn(*heads, AttentionMetadata(attn_mask=mask)).flatten(2)


class ToyTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_in = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList([ToyBlock(), ToyBlock()])
        self.empty = nn.ModuleList()
        self.proj_out = nn.Linear(WIDTH, 4)

    def forward(self, hidden_states, positions, num_text, mask=None):
        hidden_states = self.proj_in(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states, positions, mask=mask)
        return self.proj_out(hidden_states[:, num_text:])


def _plan(kind):
    gather = {"proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3)}
    if kind == "text in front":
        partial = SequenceParallelPartialInput(split_dim=1, text_len_source="num_text", expected_dims=3)
        return {"": {"hidden_states": partial, "positions": partial}, **gather}
    split = SequenceParallelInput(split_dim=1, expected_dims=3, auto_pad=True)
    if kind == "split at each block":
        return {
            "proj_in": {0: SequenceParallelInput(split_dim=1, split_output=True)},
            "blocks.*": {"positions": split},
            **gather,
        }
    if kind == "wrong dims":
        split = SequenceParallelInput(split_dim=1, expected_dims=4)
    return {"": {"hidden_states": split, "positions": split}, **gather}


class FileMemory(PeerMemory):
    """What :class:`PeerMemory` is on GPUs, in files that processes share."""

    def __init__(self, folder, group):
        super().__init__(torch.device("cpu"), group.process_group)
        self.folder, self.group = folder, group
        self.members = dist.get_process_group_ranks(group.process_group)

    def _new_buffer(self, name, num_bytes):
        paths = [f"{self.folder}/{name}-{self.members}-{rank}" for rank in self.members]
        return FileBuffer(paths, num_bytes, self)


class FileBuffer:
    def __init__(self, paths, num_bytes, memory):
        self.memory, self.num_bytes = memory, num_bytes
        self.maps = [torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8) for path in paths]

    def on(self, rank, shape, dtype):
        return self.maps[rank].view(dtype)[: torch.Size(shape).numel()].view(shape)

    def barrier(self):
        dist.barrier(group=self.memory.group.process_group)


def with_peers(groups, folder):
    """The groups with memory that ranks of Ulysses, of a ring and of tensor parallelism write to."""
    kinds = {name: getattr(groups, name) for name in ("ulysses", "ring", "tp")}
    with_memory = {
        name: replace(group, peers=FileMemory(folder, group)) for name, group in kinds.items() if group.size > 1
    }
    return replace(groups, **with_memory)


@torch.inference_mode()
def run_toy(kind, ring, ulysses, peers_folder=None):
    """The error, or output on ranks, output of one, and how many tokens a block saw."""
    num_text = NUM_TEXT if kind == "text in front" else 0
    groups = groups_of(ParallelLayout(ring=ring, ulysses=ulysses), "cpu", False)
    if peers_folder is not None:
        groups = with_peers(groups, peers_folder)

    class Planned(ToyTransformer):
        _sp_plan = _plan(kind)

    generator = torch.Generator().manual_seed(0)
    length = num_text + NUM_IMAGE
    inputs = {
        "hidden_states": torch.randn(2, length, 4, generator=generator),
        "positions": torch.randn(1, length, 3 * WIDTH, generator=generator),
        "num_text": num_text,
        "mask": torch.rand(2, length, generator=generator) > 0.3,
    }
    torch.manual_seed(1)
    whole = ToyTransformer()
    with parallel_groups(groups):
        split = Planned()
    split.load_state_dict(whole.state_dict())
    apply_sequence_plans(split, groups)
    try:
        output = split(**inputs)
    except ValueError as error:
        return str(error), None, None, 0
    return None, output, whole(**inputs), split.blocks[1].tokens - num_text
