"""What a request will become, from its latents and a linear map to colours: milliseconds, where a decoder takes long.

With flow matching ``x = (1 - sigma) * sample + sigma * noise``, and a step from ``x`` to ``x'`` moves along
``noise - sample``. So the sample that a request is heading for follows from its latents before and after a step,
whatever its sampler is: ``sample = x' - sigma' * (x' - x) / (sigma' - sigma)``.

Shapes: N outputs, F latent frames, R x S tokens of a frame, C channels of a token, P preview pixels of a token's side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_omni.diffusion.data import read_json
from vllm_omni.diffusion.denoise_state import DenoiseState
from vllm_omni.errors import InvalidModelFolderError

PREVIEW_FILE = "latent_preview.json"


def estimated_sample(state: DenoiseState, previous: torch.Tensor) -> torch.Tensor:
    """What ``state`` is heading for, ``[N, ...]``; ``previous`` are its latents before the last step."""
    step = state.step_index
    width, level = state.sigmas[step] - state.sigmas[step - 1], state.sigmas[step]
    return state.latents - level / width * (state.latents - previous)


def decoded_preview(
    decode: Callable[[DenoiseState], torch.Tensor], state: DenoiseState, previous: torch.Tensor
) -> torch.Tensor | None:
    """The same by the model's own decoder, for a model without a map: as exact as slow. None if these are no pictures.

    uint8 ``[N, H, W, 3]`` on the CPU.
    """
    heading = copy.copy(state)
    heading.latents = estimated_sample(state, previous)
    pixels = decode(heading)
    if pixels.dim() != 4:
        return None
    colours = pixels[:, :3].float().mul(127.5).add(127.5).clamp(0, 255).round()
    return colours.to(torch.uint8).permute(0, 2, 3, 1).cpu()


@dataclass(frozen=True, kw_only=True)
class LatentPreview:
    """A map of one autoencoder's latents to colours, fitted by ``tools/fit_preview.py`` and kept beside the model."""

    pixels_per_token: int  # side of the square of output pixels that a token, or a latent pixel, stands for
    weight: torch.Tensor  # [C * K * K, 3 * P * P], float32
    bias: torch.Tensor  # [3 * P * P], float32; colours are in [0, 1]
    kernel: int = 1  # K: tokens on the side of the square around a token that its colours depend on, odd

    @classmethod
    def load(cls, model: str) -> LatentPreview | None:
        """The map in a model's folder, None if it has none. Raises ``InvalidModelFolderError`` for a broken one."""
        path = Path(model) / PREVIEW_FILE
        if not path.exists():
            return None
        content = read_json(path)
        try:
            weight, bias = (torch.tensor(content[name], dtype=torch.float32) for name in ("weight", "bias"))
            side, kernel = int(content["pixels_per_token"]), int(content.get("kernel", 1))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidModelFolderError(
                f"{path} must hold pixels_per_token, weight [C * K * K, 3 * P * P] and bias [3 * P * P], and kernel (K)"
                f" if it is not 1; {error!r}"
            ) from error
        patch = round((bias.numel() / 3) ** 0.5)
        if weight.dim() != 2 or list(bias.shape) != [3 * patch**2] or weight.shape[1] != bias.numel() or not patch:
            raise InvalidModelFolderError(
                f"{path}: weight is {list(weight.shape)} and bias {list(bias.shape)}; they must be"
                " [C * K * K, 3 * P * P] and [3 * P * P]"
            )
        if kernel < 1 or not kernel % 2 or weight.shape[0] % kernel**2:
            raise InvalidModelFolderError(
                f"{path}: kernel={kernel} must be odd, and its square divide the {weight.shape[0]} rows of weight"
            )
        return cls(pixels_per_token=side, weight=weight, bias=bias, kernel=kernel)

    def __call__(self, state: DenoiseState, previous: torch.Tensor) -> torch.Tensor:
        """uint8 ``[N, R * P, S * P, 3]`` on the CPU, of a video's middle frame.

        ``previous [N, ...]`` are the latents before the last step. Waits for the device.
        """
        return self.colours(estimated_sample(state, previous), state.height, state.width)

    def colours(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Latents ``[N, F * R * S, C]`` or ``[N, C, F, R, S]`` of ``height`` x ``width`` pixels as colours."""
        rows, columns = height // self.pixels_per_token, width // self.pixels_per_token
        if latents.dim() == 5:
            latents = latents.permute(0, 2, 3, 4, 1)
        num_channels = self.weight.shape[0] // self.kernel**2
        frames = latents.reshape(latents.shape[0], -1, rows, columns, num_channels)
        frame = neighbourhoods(frames[:, frames.shape[1] // 2].float(), self.kernel)
        values = frame @ self.weight.to(frame.device) + self.bias.to(frame.device)
        patch = round((values.shape[-1] / 3) ** 0.5)
        picture = values.view(-1, rows, columns, patch, patch, 3).transpose(2, 3).flatten(1, 2).flatten(2, 3)
        return (picture.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def neighbourhoods(frame: torch.Tensor, kernel: int) -> torch.Tensor:
    """``[N, R, S, C] -> [N, R, S, C * kernel * kernel]``: each token with those around it, beyond the edge zeros."""
    if kernel == 1:
        return frame
    around = torch.nn.functional.unfold(frame.permute(0, 3, 1, 2), kernel, padding=kernel // 2)
    return around.transpose(1, 2).reshape(*frame.shape[:3], -1)
