"""What a request will become, from its latents and a linear map to colours: milliseconds, where a decoder takes long.

With flow matching ``x = (1 - sigma) * sample + sigma * noise``, and a step from ``x`` to ``x'`` moves along
``noise - sample``. So the sample that a request is heading for follows from its latents before and after a step,
whatever its sampler is: ``sample = x' - sigma' * (x' - x) / (sigma' - sigma)``.

Shapes: N outputs, F latent frames, R x S tokens of a frame, C channels of a token, P preview pixels of a token's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_omni.diffusion.data import read_json
from vllm_omni.diffusion.denoise_state import DenoiseState
from vllm_omni.errors import InvalidModelFolderError

PREVIEW_FILE = "latent_preview.json"


@dataclass(frozen=True, kw_only=True)
class LatentPreview:
    """A map of one autoencoder's latents to colours, fitted by ``tools/fit_preview.py`` and kept beside the model."""

    pixels_per_token: int  # side of the square of output pixels that a token, or a latent pixel, stands for
    weight: torch.Tensor  # [C, 3 * P * P], float32
    bias: torch.Tensor  # [3 * P * P], float32; colours are in [0, 1]

    @classmethod
    def load(cls, model: str) -> LatentPreview | None:
        """The map in a model's folder, None if it has none. Raises ``InvalidModelFolderError`` for a broken one."""
        path = Path(model) / PREVIEW_FILE
        if not path.exists():
            return None
        content = read_json(path)
        try:
            weight, bias = (torch.tensor(content[name], dtype=torch.float32) for name in ("weight", "bias"))
            side = int(content["pixels_per_token"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidModelFolderError(
                f"{path} must hold pixels_per_token, weight [C, 3 * P * P] and bias [3 * P * P]; {error!r}"
            ) from error
        patch = round((bias.numel() / 3) ** 0.5)
        if weight.dim() != 2 or list(bias.shape) != [3 * patch**2] or weight.shape[1] != bias.numel() or not patch:
            raise InvalidModelFolderError(
                f"{path}: weight is {list(weight.shape)} and bias {list(bias.shape)}; they must be [C, 3 * P * P] and"
                " [3 * P * P]"
            )
        return cls(pixels_per_token=side, weight=weight, bias=bias)

    def __call__(self, state: DenoiseState, previous: torch.Tensor) -> torch.Tensor:
        """uint8 ``[N, R * P, S * P, 3]`` on the CPU, of a video's middle frame.

        ``previous [N, ...]`` are the latents before the last step. Waits for the device.
        """
        step = state.step_index
        width, level = state.sigmas[step] - state.sigmas[step - 1], state.sigmas[step]
        sample = state.latents - level / width * (state.latents - previous)
        return self.colours(sample, state.height, state.width)

    def colours(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Latents ``[N, F * R * S, C]`` or ``[N, C, F, R, S]`` of ``height`` x ``width`` pixels as colours."""
        rows, columns = height // self.pixels_per_token, width // self.pixels_per_token
        if latents.dim() == 5:
            latents = latents.permute(0, 2, 3, 4, 1)
        num_channels = self.weight.shape[0]
        frames = latents.reshape(latents.shape[0], -1, rows, columns, num_channels)
        frame = frames[:, frames.shape[1] // 2].float()
        values = frame @ self.weight.to(frame.device) + self.bias.to(frame.device)
        patch = round((values.shape[-1] / 3) ** 0.5)
        picture = values.view(-1, rows, columns, patch, patch, 3).transpose(2, 3).flatten(1, 2).flatten(2, 3)
        return (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
