"""The dual-stream transformer of Qwen-Image (arXiv:2508.02324). Parameter names follow its diffusers checkpoint.

Text and image tokens keep weights of their own in every block and meet in a joint attention, text first. Image tokens
are those of one or several pictures: the noisy one first, then the pictures that an editing model starts from.

Shapes: B rows, T text tokens, I image tokens, S = T + I, H heads of this rank, D head size, E width of the model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.sequence_parallel import (
    SequenceParallelInput,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
)
from vllm_omni.diffusion.layers.adalayernorm import AdaLayerNorm, AdaLayerNormContinuous
from vllm_omni.diffusion.layers.embeddings import TimestepEmbedding, sinusoidal_embedding
from vllm_omni.diffusion.layers.feedforward import FeedForward
from vllm_omni.diffusion.layers.joint_attention import JointAttention
from vllm_omni.diffusion.layers.linear import ModulationLinear, ReplicatedLinear
from vllm_omni.diffusion.layers.norm import RMSNorm, gated_residual
from vllm_omni.diffusion.layers.rope import rope_angles
from vllm_omni.diffusion.staged_forward import BlockSpan, Conditioning, RowInputs, SharedInputs, StagedForward, Streams
from vllm_omni.errors import InvalidModelFolderError

_TIMESTEP_CHANNELS = 256

# (frames, rows, columns) of one picture in tokens
ImageShape = tuple[int, int, int]


@functools.lru_cache(maxsize=64)
def joint_rope(
    img_shapes: tuple[ImageShape, ...],
    num_text_tokens: int,
    axes_dims: tuple[int, ...],
    device: torch.device,
    layered: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the rotary angles of all tokens, text first: ``[T + I, D / 2]`` each, in float32.

    A picture's index, row and column each rotate their share of the head. Rows and columns count from the centre,
    so that a larger picture extends the positions of a smaller one on all sides; text goes on along the diagonal.
    With ``layered`` the pictures are layers and, last, the picture that they come from, whose index is -1.
    """
    last = len(img_shapes) - 1
    angles = []
    for position, (frames, rows, columns) in enumerate(img_shapes):
        index = -1 if layered and position == last else position
        axes = (
            torch.arange(index, index + frames, device=device),
            torch.arange(rows, device=device) - (rows - rows // 2),
            torch.arange(columns, device=device) - (columns - columns // 2),
        )
        grid = torch.meshgrid(*axes, indexing="ij")
        angles.append(_axes_angles([positions.flatten() for positions in grid], axes_dims))
    first_text = max(max(rows // 2, columns // 2) for _, rows, columns in img_shapes)
    if layered:
        first_text = max(first_text, last)
    text = torch.arange(first_text, first_text + num_text_tokens, device=device)
    joint = torch.cat([_axes_angles([text] * len(axes_dims), axes_dims), *angles])
    return joint.cos(), joint.sin()


def _axes_angles(positions: Sequence[torch.Tensor], axes_dims: Sequence[int]) -> torch.Tensor:
    return torch.cat([rope_angles(axis, dim) for axis, dim in zip(positions, axes_dims, strict=True)], dim=-1)


@functools.lru_cache(maxsize=64)
def modulation_index(img_shapes: tuple[ImageShape, ...], device: torch.device) -> torch.Tensor:
    """``[I]``: 0 for tokens of the first picture, which is noisy, and 1 for those of the others, which are clean."""
    counts = [math.prod(shape) for shape in img_shapes]
    index = torch.ones(sum(counts), dtype=torch.long, device=device)
    index[: counts[0]] = 0
    return index


class QwenTokenPositions(nn.Module):
    """What depends on a token's place, as a module: a plan of sequence parallelism can split what a module returns."""

    def __init__(self, axes_dims: Sequence[int], layered: bool) -> None:
        super().__init__()
        self.axes_dims = tuple(axes_dims)
        self.layered = layered

    def forward(
        self, img_shapes: tuple[ImageShape, ...], num_text: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cosine and sine of all tokens, ``[T + I, D / 2]``, text first, and :func:`modulation_index`, ``[I]``."""
        cos, sin = joint_rope(img_shapes, num_text, self.axes_dims, device, self.layered)
        return cos, sin, modulation_index(img_shapes, device)


class QwenTimestepProjEmbeddings(nn.Module):
    """The conditioning vector: the timestep, and what else a variant of the model takes.

    That is the guidance scale of a guidance-distilled model, or one of two learned kinds of pictures.
    """

    def __init__(self, embedding_dim: int, guidance_embeds: bool, use_additional_t_cond: bool) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(_TIMESTEP_CHANNELS, embedding_dim)
        self.guidance_embedder = TimestepEmbedding(_TIMESTEP_CHANNELS, embedding_dim) if guidance_embeds else None
        self.addition_t_embedding = nn.Embedding(2, embedding_dim) if use_additional_t_cond else None

    def forward(
        self,
        timestep: torch.Tensor,
        guidance: torch.Tensor | None,
        additional_t_cond: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """``timestep [B] in [0, 1], guidance [B], additional_t_cond [B] of 0 or 1 -> [B, E]``."""
        embedding: torch.Tensor = self.timestep_embedder(_sinusoids(timestep, dtype))
        if self.guidance_embedder is not None:
            assert guidance is not None, "a guidance-distilled model needs a guidance scale"
            embedding = embedding + self.guidance_embedder(_sinusoids(guidance, dtype))
        if self.addition_t_embedding is not None:
            assert additional_t_cond is not None, "this variant of the model needs additional_t_cond"
            embedding = embedding + self.addition_t_embedding(additional_t_cond).to(dtype)
        return embedding


def _sinusoids(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return sinusoidal_embedding(values, _TIMESTEP_CHANNELS, scale=1000.0).to(dtype)


class QwenImageTransformerBlock(nn.Module):
    """One block: modulated joint attention, then a modulated feed-forward network for each stream."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        # The checkpoint's name is img_mod.1: index 0 is SiLU, which the transformer applies once for all blocks.
        self.img_mod = nn.ModuleList([nn.Identity(), ModulationLinear(dim, 6 * dim)])
        self.txt_mod = nn.ModuleList([nn.Identity(), ModulationLinear(dim, 6 * dim)])
        self.norm = AdaLayerNorm(dim, eps)
        self.attn = JointAttention(dim, num_heads, head_dim, eps)
        self.img_mlp = FeedForward(dim)
        self.txt_mlp = FeedForward(dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        attn_mask: torch.Tensor | None,
        clean_conditioning: torch.Tensor | None = None,
        modulate_index: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``image [B, I, E], text [B, T, E], conditioning [B, E] -> image, text`` of the same shapes.

        With ``clean_conditioning [B, E]``, it modulates the image tokens whose ``modulate_index [I]`` is 1.
        """
        img_attn_mod, img_mlp_mod = self.img_mod[1](conditioning).chunk(2, dim=-1)
        txt_attn_mod, txt_mlp_mod = self.txt_mod[1](conditioning).chunk(2, dim=-1)
        if clean_conditioning is not None:
            assert modulate_index is not None, "two conditionings of the image tokens need an index"
            clean_attn_mod, clean_mlp_mod = self.img_mod[1](clean_conditioning).chunk(2, dim=-1)
            img_attn_mod = torch.stack([img_attn_mod, clean_attn_mod], dim=1)[:, modulate_index]
            img_mlp_mod = torch.stack([img_mlp_mod, clean_mlp_mod], dim=1)[:, modulate_index]
        image, img_gate = self.norm(hidden_states, img_attn_mod)
        text, txt_gate = self.norm(encoder_hidden_states, txt_attn_mod)
        image, text = self.attn(image, text, rope, attn_mask)
        hidden_states, modulated, img_gate = self.norm.after_gate(hidden_states, img_gate, image, img_mlp_mod)
        encoder_hidden_states, modulated_text, txt_gate = self.norm.after_gate(
            encoder_hidden_states, txt_gate, text, txt_mlp_mod
        )
        image, text = self.img_mlp.with_other(modulated, self.txt_mlp, modulated_text)
        hidden_states = gated_residual(hidden_states, img_gate, image)
        encoder_hidden_states = gated_residual(encoder_hidden_states, txt_gate, text)
        return _in_range(hidden_states), _in_range(encoder_hidden_states)


def _in_range(x: torch.Tensor) -> torch.Tensor:
    """Large activations exceed float16; other dtypes have the range."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class QwenImageTransformer2DModel(nn.Module):
    """The denoiser. Its keyword arguments are those of the checkpoint's ``config.json``.

    ``guidance_embeds`` adds an embedding of the guidance scale, named as in FLUX.1; no published Qwen-Image has it.
    With ``zero_cond_t`` the tokens of clean pictures are modulated as at timestep 0. ``use_additional_t_cond`` adds an
    embedding of the kind of picture, ``use_layer3d_rope`` gives the source of layers a position before the first.
    """

    _repeated_blocks = ["QwenImageTransformerBlock"]
    _sp_plan = {
        "img_in": {0: SequenceParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "pos_embed": {
            0: SequenceParallelPartialInput(split_dim=0, text_len_source="num_text", split_output=True),
            1: SequenceParallelPartialInput(split_dim=0, text_len_source="num_text", split_output=True),
            2: SequenceParallelInput(split_dim=0, expected_dims=1, split_output=True),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    }

    def __init__(
        self,
        *,
        od_config: OmniDiffusionConfig | None = None,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        zero_cond_t: bool = False,
        use_additional_t_cond: bool = False,
        use_layer3d_rope: bool = False,
    ) -> None:
        super().__init__()
        if sum(axes_dims_rope) != attention_head_dim:
            raise InvalidModelFolderError(
                f"transformer/config.json: axes_dims_rope={list(axes_dims_rope)} must add up to"
                f" attention_head_dim={attention_head_dim}"
            )
        self.od_config = od_config
        dim = num_attention_heads * attention_head_dim
        self.zero_cond_t = zero_cond_t
        self.pos_embed = QwenTokenPositions(axes_dims_rope, use_layer3d_rope)
        self.time_text_embed = QwenTimestepProjEmbeddings(dim, guidance_embeds, use_additional_t_cond)
        self.txt_norm = RMSNorm(joint_attention_dim)
        self.img_in = ReplicatedLinear(in_channels, dim)
        self.txt_in = ReplicatedLinear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            [QwenImageTransformerBlock(dim, num_attention_heads, attention_head_dim) for _ in range(num_layers)]
        )
        self.norm_out = AdaLayerNormContinuous(dim, dim)
        self.proj_out = ReplicatedLinear(dim, patch_size**2 * out_channels)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        img_shapes: tuple[ImageShape, ...],
        encoder_hidden_states_mask: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        additional_t_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the velocity ``noise - sample`` of every image token.

        ``image [B, I, C], text [B, T, J], timestep [B] in [0, 1], mask [B, T], guidance [B] -> [B, I, C]``.
        ``img_shapes`` is shared by all rows. Masked text tokens change nothing. ``additional_t_cond`` is ``[B]``.
        """
        return self.stages(
            hidden_states,
            encoder_hidden_states,
            timestep,
            img_shapes,
            encoder_hidden_states_mask,
            guidance,
            additional_t_cond,
        ).run()

    def stages(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        img_shapes: tuple[ImageShape, ...],
        encoder_hidden_states_mask: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        additional_t_cond: torch.Tensor | None = None,
    ) -> StagedForward:
        """The forward of these inputs in its parts. Its streams are image and text."""
        num_image, device = hidden_states.shape[1], hidden_states.device
        num_text = encoder_hidden_states.shape[1]
        attn_mask = None
        if encoder_hidden_states_mask is not None:
            attn_mask = F.pad(encoder_hidden_states_mask, (0, num_image), value=True)
        image = self.img_in(hidden_states)
        cos, sin, token_kinds = self.pos_embed(img_shapes, num_text, device)
        text = self.txt_in(self.txt_norm(encoder_hidden_states))
        embed = functools.partial(self.time_text_embed, dtype=image.dtype)
        embedding = embed(timestep, guidance, additional_t_cond)
        conditioning = F.silu(embedding)
        clean_conditioning, modulate_index = None, None
        if self.zero_cond_t:
            clean_conditioning = F.silu(embed(torch.zeros_like(timestep), guidance, additional_t_cond))
            modulate_index = token_kinds

        def run_block(block: nn.Module, streams: Streams, row_inputs: RowInputs, shared: SharedInputs) -> Streams:
            conditioning, _, attn_mask, clean_conditioning = row_inputs
            output: Streams = block(*streams, conditioning, shared[:2], attn_mask, clean_conditioning, shared[2])
            return output

        def modulated_input() -> torch.Tensor:
            block: Any = self.transformer_blocks[0]
            modulated: torch.Tensor = block.norm(image, block.img_mod[1](conditioning).chunk(2, dim=-1)[0])[0]
            # Tokens that are modulated as at timestep 0 would only dilute the change between two steps.
            return modulated * (token_kinds == 0)[:, None] if self.zero_cond_t else modulated

        return StagedForward(
            streams=(image, text),
            row_inputs=(conditioning, embedding, attn_mask, clean_conditioning),
            shared_inputs=(cos, sin, modulate_index),
            conditioning=Conditioning(
                compute=lambda *inputs: F.silu(embed(*inputs)), others=(guidance, additional_t_cond)
            ),
            spans=(BlockSpan(blocks=self.transformer_blocks, call=run_block),),
            modulated_input=modulated_input,
            output_tokens=lambda streams: streams[0],
            finish=lambda tokens, row_inputs: self.proj_out(self.norm_out(tokens, row_inputs[1])),
        )
