"""The video transformer of Wan 2.1 and 2.2 (arXiv:2503.20314). Parameter names follow its diffusers checkpoint.

Video tokens attend to each other with rotary positions in time, height and width, then to the text, and in Wan 2.1
image to video also to the features of the first picture.

Shapes: B rows, F H W latent frames, height and width, S video tokens, G groups of consecutive tokens that share a
timestep (G divides S), T text tokens, I tokens of the picture, N heads of this rank, D head size, E model width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.sequence_parallel import SequenceParallelInput, SequenceParallelOutput
from vllm_omni.diffusion.layers.embeddings import TimestepEmbedding, sinusoidal_embedding
from vllm_omni.diffusion.layers.feedforward import FeedForward
from vllm_omni.diffusion.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm_omni.diffusion.layers.norm import (
    ColumnParallelRMSNorm,
    gated_residual,
    gated_residual_norm_modulate,
    layer_norm_modulate,
)
from vllm_omni.diffusion.layers.rope import QKNormRope, rope_angles
from vllm_omni.diffusion.staged_forward import BlockSpan, RowInputs, SharedInputs, StagedForward, Streams
from vllm_omni.errors import InvalidModelFolderError

_NUM_MODULATIONS = 6

Rope = tuple[torch.Tensor, torch.Tensor]


@functools.lru_cache(maxsize=16)
def video_rope(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Rope:
    """Cosine and sine of the rotary angles of a grid of (frames, rows, columns) tokens: ``[S, D / 2]`` in float32.

    Rows and columns rotate a third of the head each, rounded down to pairs; frames rotate what remains.
    """
    side_dim = 2 * (head_dim // 6)
    axes = [torch.arange(size, device=device) for size in grid]
    positions = torch.meshgrid(*axes, indexing="ij")
    dims = (head_dim - 2 * side_dim, side_dim, side_dim)
    angles = torch.cat([rope_angles(axis.flatten(), dim) for axis, dim in zip(positions, dims, strict=True)], dim=-1)
    return angles.cos(), angles.sin()


class WanRope(nn.Module):
    """The rotary angles of a video, as a module: a plan of sequence parallelism can split what a module returns."""

    def forward(self, grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Rope:
        return video_rope(grid, head_dim, device)


class WanPatchEmbedding(nn.Module):
    """One token per patch. The checkpoint holds a convolution, which is a linear layer over patches."""

    def __init__(self, in_channels: int, dim: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.weight = nn.Parameter(torch.empty(dim, in_channels, *patch_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """``[B, C, F, H, W] -> [B, S, E]``, frame by frame and row by row."""
        frames, rows, columns = self.patch_size
        patches = latents.unflatten(4, (-1, columns)).unflatten(3, (-1, rows)).unflatten(2, (-1, frames))
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class WanTextProjection(nn.Module):
    """Two linear layers with GELU between them, from the text encoder's width to the model's."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = ReplicatedLinear(text_dim, dim)
        self.linear_2 = ReplicatedLinear(dim, dim)

    def forward(self, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        """``[B, T, J] -> [B, T, E]``."""
        output: torch.Tensor = self.linear_2(F.gelu(self.linear_1(encoder_hidden_states), approximate="tanh"))
        return output


class WanImageEmbedding(nn.Module):
    """From the features of the picture to the model's width."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(image_dim)
        self.ff = FeedForward(image_dim, inner_size=image_dim, output_size=dim, approximate="none")
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, encoder_hidden_states_image: torch.Tensor) -> torch.Tensor:
        """``[B, I, K] -> [B, I, E]``."""
        output: torch.Tensor = self.norm2(self.ff(self.norm1(encoder_hidden_states_image)))
        return output


class WanTimeTextImageEmbedding(nn.Module):
    """Everything that the video tokens are conditioned on."""

    def __init__(self, dim: int, freq_dim: int, text_dim: int, image_dim: int | None) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        # In float32 as in the checkpoint: neighbouring timesteps differ by less than bfloat16 resolves.
        self.time_embedder = TimestepEmbedding(freq_dim, dim).float()
        self.time_proj = ReplicatedLinear(dim, _NUM_MODULATIONS * dim)
        self.text_embedder = WanTextProjection(text_dim, dim)
        self.image_embedder = None if image_dim is None else WanImageEmbedding(image_dim, dim)

    def forward(self, timestep: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """``timestep [B, G] in [0, 1000] -> embedding [B, G, E], modulations [B, G, 6, E]``."""
        sinusoids = sinusoidal_embedding(timestep.flatten(), self.freq_dim)
        embedding: torch.Tensor = self.time_embedder(sinusoids).to(dtype).unflatten(0, timestep.shape)
        modulations: torch.Tensor = self.time_proj(F.silu(embedding))
        return embedding, modulations.unflatten(-1, (_NUM_MODULATIONS, -1))


class WanSelfAttention(nn.Module):
    """Attention of the video tokens over each other. Query and key are normalised over all heads together."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.to_qkv = QKVParallelLinear(dim, head_dim, num_heads)
        self.norm_q = ColumnParallelRMSNorm(dim, eps)
        self.norm_k = ColumnParallelRMSNorm(dim, eps)
        self.qk_norm_rope = QKNormRope(self.to_qkv.num_heads)
        self.attn = Attention(self.to_qkv.num_heads, head_dim)
        self.to_out = nn.ModuleList([RowParallelLinear(dim, dim)])

    def forward(self, hidden_states: torch.Tensor, rope: Rope) -> torch.Tensor:
        """``[B, S, E], rope [S, D / 2] x 2 -> [B, S, E]``."""
        query, key, value = self.qk_norm_rope(self.to_qkv(hidden_states), self.norm_q, self.norm_k, rope)
        output: torch.Tensor = self.to_out[0](self.attn(query, key, value).flatten(2))
        return output


class WanCrossAttention(nn.Module):
    """Attention of the video tokens over the text, plus, if ``added_kv_proj_dim`` is given, over the picture.

    Padded text tokens take part: the checkpoints were trained with them.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, eps: float, added_kv_proj_dim: int | None) -> None:
        super().__init__()
        self.to_q = ColumnParallelLinear(dim, dim)
        self.to_kv = MergedColumnParallelLinear(dim, (dim, dim), checkpoint_names=("to_k", "to_v"))
        self.norm_q = ColumnParallelRMSNorm(dim, eps)
        self.norm_k = ColumnParallelRMSNorm(dim, eps)
        self.to_added_kv: MergedColumnParallelLinear | None = None
        if added_kv_proj_dim is not None:
            self.to_added_kv = MergedColumnParallelLinear(
                added_kv_proj_dim, (dim, dim), checkpoint_names=("add_k_proj", "add_v_proj")
            )
            self.norm_added_k = ColumnParallelRMSNorm(dim, eps)
        self.head_dim = head_dim
        # Text and picture are on every rank.
        self.attn = Attention(self.to_q.tp.divide(num_heads, "num_heads"), head_dim, skip_sequence_parallel=True)
        self.to_out = nn.ModuleList([RowParallelLinear(dim, dim)])

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        """``video [B, S, E], text [B, T, E], image [B, I, E] -> [B, S, E]``."""
        query = self._heads(self.norm_q(self.to_q(hidden_states)))
        key, value = self.to_kv.split(self.to_kv(text))
        attended = self.attn(query, self._heads(self.norm_k(key)), self._heads(value))
        if image is not None:
            assert self.to_added_kv is not None, "only a model with image_dim is given the features of a picture"
            key, value = self.to_added_kv.split(self.to_added_kv(image))
            attended = attended + self.attn(query, self._heads(self.norm_added_k(key)), self._heads(value))
        output: torch.Tensor = self.to_out[0](attended.flatten(2))
        return output

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class WanTransformerBlock(nn.Module):
    """One block: modulated self-attention, cross-attention, a modulated feed-forward network."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        head_dim: int,
        cross_attn_norm: bool,
        eps: float,
        added_kv_proj_dim: int | None,
    ) -> None:
        super().__init__()
        self.attn1 = WanSelfAttention(dim, num_heads, head_dim, eps)
        self.attn2 = WanCrossAttention(dim, num_heads, head_dim, eps, added_kv_proj_dim)
        self.norm2 = nn.LayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, inner_size=ffn_dim)
        self.scale_shift_table = _float32_table(_NUM_MODULATIONS, dim)
        self.eps = eps

    def forward(
        self,
        hidden_states: torch.Tensor,
        text: torch.Tensor,
        image: torch.Tensor | None,
        modulations: torch.Tensor,
        rope: Rope,
    ) -> torch.Tensor:
        """``video [B, S, E], text [B, T, E], image [B, I, E], modulations [B, G, 6, E] -> [B, S, E]``."""
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = _modulations(
            self.scale_shift_table, modulations
        )
        attended = self.attn1(modulate(hidden_states, attn_scale, attn_shift, self.eps), rope)
        if isinstance(self.norm2, nn.LayerNorm):
            weight, bias = (values.float().view(1, 1, 1, -1) for values in (self.norm2.weight, self.norm2.bias))
            hidden_states, normed = gate_modulate(hidden_states, attn_gate, attended, weight - 1, bias, self.eps)
        else:
            hidden_states = normed = gate(hidden_states, attn_gate, attended)
        update = self.attn2(normed, text, image)
        hidden_states, modulated = gate_modulate(
            hidden_states, torch.ones_like(mlp_gate[:1, :1]), update, mlp_scale, mlp_shift, self.eps
        )
        return gate(hidden_states, mlp_gate, self.ffn(modulated))


def modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    """``x [B, S, E], scale and shift [B, G, 1, E] in float32 -> [B, S, E]``: normalised, then modulated by group."""
    groups = x.unflatten(1, (scale.shape[1], -1))
    return layer_norm_modulate(groups, scale, shift, eps).flatten(1, 2)


def gate(residual: torch.Tensor, weight: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """``residual [B, S, E] + weight [B, G, 1, E] * update [B, S, E] -> [B, S, E]``, computed in float32."""
    groups = (weight.shape[1], -1)
    return gated_residual(residual.unflatten(1, groups), weight, update.unflatten(1, groups)).flatten(1, 2)


def gate_modulate(
    residual: torch.Tensor,
    weight: torch.Tensor,
    update: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`gate`, and :func:`modulate` of its result. Weight, or scale and shift, may be ``[1, 1, 1, E]`` for all."""
    groups = (max(weight.shape[1], scale.shape[1]), -1)
    summed, modulated = gated_residual_norm_modulate(
        residual.unflatten(1, groups), weight, update.unflatten(1, groups), scale, shift, eps
    )
    return summed.flatten(1, 2), modulated.flatten(1, 2)


def _modulations(table: torch.Tensor, embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``table [1, M, E] in float32, embedding [B, G, M or 1, E] -> M of [B, G, 1, E]`` in float32."""
    return (table + embedding.float()).split(1, dim=2)


def _float32_table(num_rows: int, dim: int) -> nn.Parameter:
    """``[1, M, E]``; in float32 as in the checkpoint, for it is added to every modulation."""
    return nn.Parameter(torch.empty(1, num_rows, dim, dtype=torch.float32), requires_grad=False)


class WanTransformer3DModel(nn.Module):
    """The denoiser. Its keyword arguments are those of the checkpoint's ``config.json``."""

    _repeated_blocks = ["WanTransformerBlock"]
    _sp_plan = {
        "patch_embedding": {0: SequenceParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "rope": dict.fromkeys((0, 1), SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True)),
        "condition_embedder": {
            0: SequenceParallelInput(split_dim=1, expected_dims=3, split_output=True),
            1: SequenceParallelInput(split_dim=1, expected_dims=4, split_output=True),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    }

    def __init__(
        self,
        *,
        od_config: OmniDiffusionConfig | None = None,
        patch_size: Sequence[int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int | None = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("qk_norm", qk_norm, "rms_norm_across_heads"),
            ("pos_embed_seq_len", pos_embed_seq_len, None),  # of models that are given a last picture, too
        ):
            if value != allowed:
                raise InvalidModelFolderError(f"transformer/config.json: {name}={value!r} must be {allowed!r}")
        self.od_config = od_config
        dim = num_attention_heads * attention_head_dim
        out_channels = in_channels if out_channels is None else out_channels
        self.patch_size = tuple(patch_size)
        self.head_dim = attention_head_dim
        self.eps = eps
        self.rope_max_seq_len = rope_max_seq_len  # tokens along one axis that the model was trained for
        self.rope = WanRope()
        self.patch_embedding = WanPatchEmbedding(in_channels, dim, patch_size)
        self.condition_embedder = WanTimeTextImageEmbedding(dim, freq_dim, text_dim, image_dim)
        self.blocks = nn.ModuleList(
            [
                WanTransformerBlock(
                    dim, ffn_dim, num_attention_heads, attention_head_dim, cross_attn_norm, eps, added_kv_proj_dim
                )
                for _ in range(num_layers)
            ]
        )
        self.proj_out = ReplicatedLinear(dim, out_channels * math.prod(patch_size))
        self.scale_shift_table = _float32_table(2, dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the velocity ``noise - sample`` of every latent.

        ``latents [B, C, F, H, W], timestep [B] or [B, G] in [0, 1000], text [B, T, J], picture [B, I, K]
        -> [B, C, F, H, W]``. With ``[B, G]`` each of G equal runs of tokens has a timestep of its own: one per
        frame, or one per token.
        """
        return self.stages(hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image).run()

    def stages(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
    ) -> StagedForward:
        """The forward of these inputs in its parts. Its only stream is the video."""
        sizes = zip(hidden_states.shape[2:], self.patch_size, strict=True)
        frames, rows, columns = (size // side for size, side in sizes)
        video = self.patch_embedding(hidden_states)
        rope = self.rope((frames, rows, columns), self.head_dim, hidden_states.device)
        embedder = self.condition_embedder
        timestep = timestep.unsqueeze(1) if timestep.dim() == 1 else timestep
        embedding, modulations = embedder(timestep, video.dtype)
        text = embedder.text_embedder(encoder_hidden_states)
        image = None
        if encoder_hidden_states_image is not None:
            assert embedder.image_embedder is not None, "only a model with image_dim is given a picture's features"
            image = embedder.image_embedder(encoder_hidden_states_image)

        def run_block(block: nn.Module, streams: Streams, row_inputs: RowInputs, rope: SharedInputs) -> Streams:
            text, image, modulations, _ = row_inputs
            return (block(*streams, text, image, modulations, rope),)

        def finish(tokens: torch.Tensor, row_inputs: RowInputs) -> torch.Tensor:
            embedding = row_inputs[3]
            assert embedding is not None, "every forward has an embedding of its timestep"
            shift, scale = _modulations(self.scale_shift_table, embedding.unsqueeze(2))
            output: torch.Tensor = self.proj_out(modulate(tokens, scale, shift, self.eps))
            return self._unpatchify(output, frames, rows, columns)

        return StagedForward(
            streams=(video,),
            row_inputs=(text, image, modulations, embedding),
            shared_inputs=rope,
            spans=(BlockSpan(blocks=self.blocks, call=run_block),),
            # The published coefficients are those of the modulations, not of the tokens that they modulate.
            modulated_input=lambda: modulations,
            output_tokens=lambda streams: streams[0],
            finish=finish,
        )

    def _unpatchify(self, tokens: torch.Tensor, frames: int, rows: int, columns: int) -> torch.Tensor:
        """``[B, S, P * C] -> [B, C, F, H, W]``."""
        patches = tokens.unflatten(2, (*self.patch_size, -1)).unflatten(1, (frames, rows, columns))
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
