"""Self-attention over a sequence that ranks have split: Ulysses (arXiv:2309.14509), ring (arXiv:2310.01889), or both.

Ulysses exchanges tokens for heads before the attention and back after it. A ring passes keys and values from rank to
rank and merges what each part contributes; with both, every group of Ulysses is one place of the ring. Text tokens that
every rank has come first: a rank attends to them once, and computes their output for the heads that it has.

Shapes: B batch, T text tokens that every rank has, S tokens of this rank, H query heads, G key/value heads, D head
size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from vllm_omni.diffusion.attention.exchange import copy_rows, heads_for_tokens, tokens_for_heads
from vllm_omni.diffusion.attention.log_sum_exp import attention_with_lse, merge
from vllm_omni.diffusion.attention.selector import select_backend
from vllm_omni.diffusion.distributed.collectives import all_gather_along
from vllm_omni.diffusion.distributed.groups import RankGroup
from vllm_omni.diffusion.distributed.peer_memory import exchange_sequence
from vllm_omni.diffusion.distributed.rank_status import waiting_for
from vllm_omni.diffusion.distributed.sequence_parallel import ShardedForward, plan_error, shard_lengths
from vllm_omni.errors import FeatureNotAvailableError


def split_attention(
    forward: ShardedForward,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    attn_mask: torch.Tensor | None,
    requested_backend: str | None,
) -> torch.Tensor:
    """``query [B, T + S, H, D], key and value [B, T + S, G, D] -> [B, T + S, H, D]``, as one rank would compute it.

    ``attn_mask`` masks keys: ``[B, T + S]``, or ``[B, T + all tokens of the sequence]``.
    """
    num_text = query.shape[1] - forward.lengths[forward.group.rank]
    if key.shape[1] != query.shape[1] or num_text < 0:
        raise plan_error(
            f"attention of {query.shape[1]} tokens over {key.shape[1]}, where this rank has"
            f" {forward.lengths[forward.group.rank]} of {forward.total} tokens: attention over keys that every rank has"
            " must be built with skip_sequence_parallel=True"
        )
    mask = _whole_mask(attn_mask, num_text, forward)
    ulysses, ring = forward.groups.ulysses, forward.groups.ring
    size, place = ulysses.size, ring.rank
    by_place = [forward.lengths[start : start + size] for start in range(0, len(forward.lengths), size)]
    heads = shard_lengths(query.shape[2], size)
    if key.shape[2] != query.shape[2] and (key.shape[2] % size or query.shape[2] % size):
        key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    kv_heads = shard_lengths(key.shape[2], size)
    query, key, value = tokens_for_heads(query, key, value, num_text, by_place[place], heads, kv_heads, ulysses)
    backend = select_backend(requested_backend, query, key, causal, mask)
    forward.used_backends.add(backend.name)
    if ring.size == 1:
        output = backend.forward(query, key, value, softmax_scale=softmax_scale, causal=causal, attn_mask=mask)
    else:
        lengths = [sum(part) for part in by_place]
        output = _ring_attention(backend.name, query, key, value, softmax_scale, mask, num_text, lengths, ring)
    return heads_for_tokens(output, num_text, by_place[place], heads, ulysses)


def _whole_mask(attn_mask: torch.Tensor | None, num_text: int, forward: ShardedForward) -> torch.Tensor | None:
    """``[B, T + all tokens]``."""
    if attn_mask is None:
        return None
    ulysses, ring = forward.groups.ulysses.size, forward.groups.ring.size
    if attn_mask.dim() != 2:
        raise FeatureNotAvailableError(
            f"ulysses_degree={ulysses}, ring_degree={ring}: the model's attention has a mask of shape"
            f" {list(attn_mask.shape)}, and ranks that split a sequence take masks of keys alone, [B, keys]; use"
            " tensor_parallel_size or cfg_parallel_size instead"
        )
    assert forward.total is not None, "attention is split where a sequence is"
    if attn_mask.shape[1] == num_text + forward.total:
        return attn_mask
    if attn_mask.shape[1] != num_text + forward.lengths[forward.group.rank]:
        raise plan_error(
            f"attn_mask has shape {list(attn_mask.shape)}; it must mask {num_text} tokens of text and {forward.total}"
            f" of the sequence, or this rank's {forward.lengths[forward.group.rank]} of them"
        )
    image = all_gather_along(attn_mask[:, num_text:].to(torch.uint8), 1, forward.lengths, forward.group)
    return torch.cat([attn_mask[:, :num_text].bool(), image.bool()], dim=1)


def _ring_attention(
    backend: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    softmax_scale: float,
    mask: torch.Tensor | None,
    num_text: int,
    lengths: Sequence[int],
    group: RankGroup,
) -> torch.Tensor:
    """Attention over the keys of every place of the ring, of which ``lengths`` are the tokens."""
    if key.shape[2] != query.shape[2]:
        key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    text_mask, image_mask = (None, None) if mask is None else (mask[:, :num_text], mask[:, num_text:])
    starts = list(itertools.accumulate(lengths, initial=0))

    def mask_of(place: int) -> torch.Tensor | None:
        return None if image_mask is None else image_mask[:, starts[place] : starts[place + 1]]

    block = key.new_empty(2, key.shape[0], lengths[group.rank], *key.shape[2:])
    for target, source in zip(block, (key, value), strict=True):
        copy_rows(target, source[:, num_text:])
    own_mask = None if text_mask is None else torch.cat([text_mask, mask_of(group.rank)], dim=1)  # type: ignore[list-item]
    result = None
    # A block is passed on from the buffer in which it came, so the next one must come into the other.
    with exchange_sequence():
        for turn in range(group.size):
            place = (group.rank - turn) % group.size
            is_last = turn + 1 == group.size
            if not is_last:
                pass_on = _pass_on if group.peers is None else _pass_to_peer
                arrived = pass_on(block, lengths[(place - 1) % group.size], max(lengths), group)
            if turn == 0:
                result = attention_with_lse(backend, query, key, value, softmax_scale, own_mask)
            else:
                part = attention_with_lse(backend, query, block[0], block[1], softmax_scale, mask_of(place))
                assert result is not None
                result = merge(result, part)
            if not is_last:
                block = arrived()
    assert result is not None, "a ring has at least one place"
    return result[0].to(query.dtype)


def _pass_on(block: torch.Tensor, coming_length: int, longest: int, group: RankGroup) -> Callable[[], torch.Tensor]:
    """Send keys and values to the next place while those of the place before come in. Returns what waits for them."""
    coming = block.new_empty(2, block.shape[1], coming_length, *block.shape[3:])
    following, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    operations = [
        dist.P2POp(dist.isend, block, group=group.process_group, group_peer=following),
        dist.P2POp(dist.irecv, coming, group=group.process_group, group_peer=before),
    ]
    with waiting_for("ranks"):  # the first time they connect
        requests = dist.batch_isend_irecv(operations)

    def arrived() -> torch.Tensor:
        with waiting_for("ranks"):
            for request in requests:
                request.wait()
        return coming

    return arrived


def _pass_to_peer(
    block: torch.Tensor, coming_length: int, longest: int, group: RankGroup
) -> Callable[[], torch.Tensor]:
    """:func:`_pass_on` into the memory of the next place, by copy engines: attention keeps the multiprocessors."""
    peers = group.peers
    assert peers is not None
    _, batch, _, *rest = block.shape
    largest = torch.Size((2, batch, longest, *rest)).numel() * block.element_size()
    buffer = peers.turn("keys", largest)
    with peers.beside():
        buffer.on((group.rank + 1) % group.size, block.shape, block.dtype).copy_(block)

    def arrived() -> torch.Tensor:
        peers.join()  # of the block, too, which must live until then
        buffer.barrier()
        return buffer.on(group.rank, (2, batch, coming_length, *rest), block.dtype)

    return arrived
