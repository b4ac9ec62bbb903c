"""What the configuration files of a Wan checkpoint say about its requests, known before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import InvalidModelFolderError


@dataclass(frozen=True, kw_only=True)
class WanCheckpoint:
    """The form of a checkpoint: Wan 2.1 has one transformer, Wan 2.2 A14B two, the 5B timesteps per frame."""

    boundary_ratio: float | None  # share of the timesteps below which the second transformer takes over
    expand_timesteps: bool  # each frame has its own timestep, and a given first frame is free of noise
    has_image_encoder: bool  # the picture's features take part in cross-attention
    spatial_factor: int  # pixels per latent pixel and side
    temporal_factor: int  # frames per latent frame, the first one aside
    num_channels: int  # of the latents
    patch_size: tuple[int, int, int]  # latent frames, rows and columns of a token
    text_dim: int
    rope_max_seq_len: int  # tokens along one axis

    @property
    def size_multiple(self) -> int:
        return self.spatial_factor * self.patch_size[1]

    @property
    def usual_video(self) -> dict[str, int]:
        """Size in pixels, frames and frames per second that the checkpoint was made for."""
        if self.expand_timesteps:
            return {"height": 704, "width": 1280, "num_frames": 121, "fps": 24}
        return {"height": 480, "width": 832, "num_frames": 81, "fps": 16}

    @classmethod
    def read(cls, od_config: OmniDiffusionConfig) -> WanCheckpoint:
        """Raises ``InvalidModelFolderError`` for parts that do not fit together."""
        index = od_config.component_config(".", "model_index.json")
        transformer, vae = od_config.tf_model_config, od_config.component_config("vae")
        checkpoint = cls(
            boundary_ratio=index.get("boundary_ratio"),
            expand_timesteps=index.get("expand_timesteps", False),
            has_image_encoder=transformer.get("image_dim") is not None,
            spatial_factor=vae.get("scale_factor_spatial", 8),
            temporal_factor=vae.get("scale_factor_temporal", 4),
            num_channels=vae.get("z_dim", 16),
            patch_size=tuple(transformer.get("patch_size", (1, 2, 2))),
            text_dim=transformer.get("text_dim", 4096),
            rope_max_seq_len=transformer.get("rope_max_seq_len", 1024),
        )
        has_second = index.get("transformer_2", [None])[0] is not None
        if has_second != (checkpoint.boundary_ratio is not None):
            raise InvalidModelFolderError(
                f"model_index.json: boundary_ratio={checkpoint.boundary_ratio} and transformer_2="
                f"{index.get('transformer_2')} must be given together, or neither of them"
            )
        if checkpoint.patch_size[0] != 1 or checkpoint.patch_size[1] != checkpoint.patch_size[2]:
            raise InvalidModelFolderError(
                f"transformer/config.json: patch_size={list(checkpoint.patch_size)} must be one frame and a square"
            )
        return checkpoint

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """``[C, F, H, W]`` of a video of frames and pixels."""
        num_latent_frames = (num_frames - 1) // self.temporal_factor + 1
        return self.num_channels, num_latent_frames, height // self.spatial_factor, width // self.spatial_factor
