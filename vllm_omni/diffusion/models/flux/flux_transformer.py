"""The transformer of FLUX.1 (arXiv:2506.15742, section 2). Parameter names follow its diffusers checkpoint.

Double-stream blocks keep weights of their own for text and image tokens, which meet in a joint attention. The
single-stream blocks after them see one sequence, text first, and compute attention and feed-forward side by side.

Shapes: B rows, T text tokens, I image tokens, S = T + I, H heads of this rank, D head size, E width of the model,
M width of a feed-forward network, C channels of a packed image token, J width of T5, P width of CLIP's pooled vector.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from vllm_omni.diffusion.attention.layer import Attention
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
from vllm_omni.diffusion.layers.linear import (
    MergedColumnParallelLinear,
    MergedRowParallelLinear,
    ModulationLinear,
    ReplicatedLinear,
)
from vllm_omni.diffusion.layers.norm import RMSNorm, gated_residual
from vllm_omni.diffusion.layers.rope import QKNormRope, rope_angles
from vllm_omni.diffusion.staged_forward import BlockSpan, Conditioning, RowInputs, SharedInputs, StagedForward, Streams
from vllm_omni.errors import InvalidModelFolderError

_TIMESTEP_CHANNELS = 256
_MLP_RATIO = 4

# (index, rows, columns) of one picture in tokens: index 0 is the one that is generated, 1 a reference
ImageShape = tuple[int, int, int]
Rope = tuple[torch.Tensor, torch.Tensor]


def position_ids(img_shapes: Sequence[ImageShape], num_text_tokens: int, device: torch.device) -> torch.Tensor:
    """Position of every token, ``[T + I, 3]``: picture, row and column; zeros for text, which comes first."""
    ids = [torch.zeros(num_text_tokens, 3, dtype=torch.int64, device=device)]
    for index, rows, columns in img_shapes:
        axes = (torch.full((1,), index, device=device), *(torch.arange(n, device=device) for n in (rows, columns)))
        ids.append(torch.cartesian_prod(*axes))
    return torch.cat(ids)


@functools.lru_cache(maxsize=64)
def joint_rope(
    img_shapes: tuple[ImageShape, ...], num_text_tokens: int, axes_dims: tuple[int, ...], device: torch.device
) -> Rope:
    """Cosine and sine of the rotary angles of all tokens, text first: ``[T + I, D / 2]`` each, in float32.

    Each axis of the position rotates its share of the head.
    """
    ids = position_ids(img_shapes, num_text_tokens, device)
    angles = torch.cat([rope_angles(ids[:, axis], dim) for axis, dim in enumerate(axes_dims)], dim=-1)
    return angles.cos(), angles.sin()


class FluxRope(nn.Module):
    """The rotary angles of all tokens, as a module: a plan of sequence parallelism can split what a module returns."""

    def forward(
        self, img_shapes: tuple[ImageShape, ...], num_text: int, axes_dims: tuple[int, ...], device: torch.device
    ) -> Rope:
        return joint_rope(img_shapes, num_text, axes_dims, device)


class FluxTimeTextEmbeddings(nn.Module):
    """The conditioning vector: the timestep, the pooled prompt, and the guidance scale of a distilled model."""

    def __init__(self, embedding_dim: int, pooled_projection_dim: int, guidance_embeds: bool) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(_TIMESTEP_CHANNELS, embedding_dim)
        self.guidance_embedder = TimestepEmbedding(_TIMESTEP_CHANNELS, embedding_dim) if guidance_embeds else None
        # The same two layers over another input.
        self.text_embedder = TimestepEmbedding(pooled_projection_dim, embedding_dim)

    def forward(self, timestep: torch.Tensor, guidance: torch.Tensor | None, pooled: torch.Tensor) -> torch.Tensor:
        """``timestep [B] in [0, 1], guidance [B], pooled [B, P] -> [B, E]``."""
        embedding: torch.Tensor = self.timestep_embedder(_sinusoids(timestep, pooled.dtype))
        if self.guidance_embedder is not None:
            assert guidance is not None, "a guidance-distilled model needs a guidance scale"
            embedding = embedding + self.guidance_embedder(_sinusoids(guidance, pooled.dtype))
        return embedding + self.text_embedder(pooled)


def _sinusoids(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[B] -> [B, 256]``. The model was trained with the angles of ``1000 * value`` rounded to its dtype."""
    return sinusoidal_embedding(values.to(dtype) * 1000, _TIMESTEP_CHANNELS).to(dtype)


class FluxModulation(nn.Module):
    """Shift, scale and gate of each of ``num_sublayers``, projected from the conditioning vector."""

    def __init__(self, dim: int, num_sublayers: int) -> None:
        super().__init__()
        self.num_sublayers = num_sublayers
        self.linear = ModulationLinear(dim, 3 * num_sublayers * dim)

    def forward(self, conditioning: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``[B, E] -> num_sublayers x [B, 3 * E]``."""
        return self.linear(conditioning).chunk(self.num_sublayers, dim=-1)


class FluxTransformerBlock(nn.Module):
    """A double-stream block: modulated joint attention, then a modulated feed-forward network for each stream."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = FluxModulation(dim, 2)
        self.norm1_context = FluxModulation(dim, 2)
        self.norm = AdaLayerNorm(dim, eps)
        self.attn = JointAttention(dim, num_heads, head_dim, eps)
        self.ff = FeedForward(dim, _MLP_RATIO)
        self.ff_context = FeedForward(dim, _MLP_RATIO)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        rope: Rope,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``image [B, I, E], text [B, T, E], conditioning [B, E] -> image, text`` of the same shapes."""
        img_attn_mod, img_mlp_mod = self.norm1(conditioning)
        txt_attn_mod, txt_mlp_mod = self.norm1_context(conditioning)
        image, img_gate = self.norm(hidden_states, img_attn_mod)
        text, txt_gate = self.norm(encoder_hidden_states, txt_attn_mod)
        image, text = self.attn(image, text, rope, None)
        hidden_states, modulated, img_gate = self.norm.after_gate(hidden_states, img_gate, image, img_mlp_mod)
        encoder_hidden_states, modulated_text, txt_gate = self.norm.after_gate(
            encoder_hidden_states, txt_gate, text, txt_mlp_mod
        )
        image, text = self.ff.with_other(modulated, self.ff_context, modulated_text)
        hidden_states = gated_residual(hidden_states, img_gate, image)
        encoder_hidden_states = gated_residual(encoder_hidden_states, txt_gate, text)
        return _in_range(hidden_states), _in_range(encoder_hidden_states)


class FluxSelfAttention(nn.Module):
    """Attention of one sequence over itself, from projections that the block has computed."""

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.norm_q = RMSNorm(head_dim, eps)
        self.norm_k = RMSNorm(head_dim, eps)
        self.qk_norm_rope = QKNormRope(num_heads)
        self.attn = Attention(num_heads, head_dim)

    def forward(self, qkv: torch.Tensor, rope: Rope) -> torch.Tensor:
        """``query, key and value as one [B, S, 3 * H * D], rope [S, D / 2] x 2 -> [B, S, H * D]``."""
        query, key, value = self.qk_norm_rope(qkv, self.norm_q, self.norm_k, rope)
        return self.attn(query, key, value).flatten(2)


class FluxSingleTransformerBlock(nn.Module):
    """A single-stream block: attention and feed-forward side by side, between two products for both."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        mlp_dim = _MLP_RATIO * dim
        self.norm = FluxModulation(dim, 1)
        self.ada_norm = AdaLayerNorm(dim, eps)
        self.to_qkv_mlp = MergedColumnParallelLinear(
            dim, (dim, dim, dim, mlp_dim), checkpoint_names=("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        )
        self.attn = FluxSelfAttention(self.to_qkv_mlp.output_sizes[0] // head_dim, head_dim, eps)
        self.proj_out = MergedRowParallelLinear((dim, mlp_dim), dim)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor, rope: Rope) -> torch.Tensor:
        """``tokens [B, S, E], conditioning [B, E] -> [B, S, E]``."""
        (mod_params,) = self.norm(conditioning)
        modulated, gate = self.ada_norm(hidden_states, mod_params)
        qkv, mlp = self.to_qkv_mlp.split_gelu(modulated)
        update = self.proj_out(mlp.after(self.attn(qkv, rope)))
        return _in_range(gated_residual(hidden_states, gate, update))


def _in_range(x: torch.Tensor) -> torch.Tensor:
    """Large activations exceed float16; other dtypes have the range."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class FluxTransformer2DModel(nn.Module):
    """The denoiser. Its keyword arguments are those of the checkpoint's ``config.json``.

    ``guidance_embeds`` tells FLUX.1-dev, which takes a guidance scale as an input, from FLUX.1-schnell.
    """

    _repeated_blocks = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
    _sp_plan = {
        "x_embedder": {0: SequenceParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "pos_embed": dict.fromkeys(
            (0, 1),
            SequenceParallelPartialInput(split_dim=0, text_len_source="num_text", expected_dims=2, split_output=True),
        ),
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    }

    def __init__(
        self,
        *,
        od_config: OmniDiffusionConfig | None = None,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
    ) -> None:
        super().__init__()
        if sum(axes_dims_rope) != attention_head_dim or len(axes_dims_rope) != 3:
            raise InvalidModelFolderError(
                f"transformer/config.json: axes_dims_rope={list(axes_dims_rope)} must be three numbers that add up to"
                f" attention_head_dim={attention_head_dim}"
            )
        self.od_config = od_config
        dim = num_attention_heads * attention_head_dim
        sizes = (dim, num_attention_heads, attention_head_dim)
        self.axes_dims_rope = tuple(axes_dims_rope)
        self.pos_embed = FluxRope()
        self.time_text_embed = FluxTimeTextEmbeddings(dim, pooled_projection_dim, guidance_embeds)
        self.context_embedder = ReplicatedLinear(joint_attention_dim, dim)
        self.x_embedder = ReplicatedLinear(in_channels, dim)
        self.transformer_blocks = nn.ModuleList([FluxTransformerBlock(*sizes) for _ in range(num_layers)])
        self.single_transformer_blocks = nn.ModuleList(
            [FluxSingleTransformerBlock(*sizes) for _ in range(num_single_layers)]
        )
        self.norm_out = AdaLayerNormContinuous(dim, dim)
        out_channels = in_channels if out_channels is None else out_channels
        self.proj_out = ReplicatedLinear(dim, patch_size**2 * out_channels)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_shapes: tuple[ImageShape, ...],
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the velocity ``noise - sample`` of every image token.

        ``image [B, I, C], text [B, T, J], pooled [B, P], timestep [B] in [0, 1], guidance [B] -> [B, I, C]``.
        ``img_shapes`` is shared by all rows; the image tokens are those of its pictures, one after the other.
        """
        return self.stages(
            hidden_states, encoder_hidden_states, pooled_projections, timestep, img_shapes, guidance
        ).run()

    def stages(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_shapes: tuple[ImageShape, ...],
        guidance: torch.Tensor | None = None,
    ) -> StagedForward:
        """The forward of these inputs in its parts. Its streams are image and text, then one of both."""
        num_text = encoder_hidden_states.shape[1]
        rope = self.pos_embed(img_shapes, num_text, self.axes_dims_rope, hidden_states.device)
        image = self.x_embedder(hidden_states)
        text = self.context_embedder(encoder_hidden_states)
        embed = self.time_text_embed
        embedding = embed(timestep, guidance, pooled_projections)
        conditioning = F.silu(embedding)

        def run_double(block: nn.Module, streams: Streams, row_inputs: RowInputs, rope: SharedInputs) -> Streams:
            output: Streams = block(*streams, row_inputs[0], rope)
            return output

        def run_single(block: nn.Module, streams: Streams, row_inputs: RowInputs, rope: SharedInputs) -> Streams:
            return (block(*streams, row_inputs[0], rope),)

        def modulated_input() -> torch.Tensor:
            block = self.transformer_blocks[0]
            modulated: torch.Tensor = block.norm(image, block.norm1(conditioning)[0])[0]
            return modulated

        return StagedForward(
            streams=(image, text),
            row_inputs=(conditioning, embedding),
            shared_inputs=rope,
            conditioning=Conditioning(
                compute=lambda *inputs: F.silu(embed(*inputs)), others=(guidance, pooled_projections)
            ),
            spans=(
                BlockSpan(blocks=self.transformer_blocks, call=run_double),
                BlockSpan(
                    blocks=self.single_transformer_blocks,
                    call=run_single,
                    enter=lambda streams: (torch.cat([streams[1], streams[0]], dim=1),),
                ),
            ),
            modulated_input=modulated_input,
            output_tokens=lambda streams: streams[0][:, num_text:],
            finish=lambda tokens, row_inputs: self.proj_out(self.norm_out(tokens, row_inputs[1])),
        )
