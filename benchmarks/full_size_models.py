"""The full-size transformers that ``full_size.py`` measures: their classes, and the inputs of one forward.

Inputs are drawn from one seed, so that both engines are given the same.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "configs"
Inputs = dict[str, Any]


@dataclass(frozen=True)
class FullSizeModel:
    """``inputs(ours, height, width)`` are the keyword arguments of a forward of this engine, or of diffusers."""

    folder: str
    model_class_name: str
    module: str
    transformer_class: str
    inputs: Callable[[bool, int, int], Inputs]

    @property
    def path(self) -> Path:
        return CONFIGS / self.folder

    @property
    def transformer_config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.path / "transformer" / "config.json").read_text())
        return config

    def our_class(self) -> Any:
        return getattr(importlib.import_module(f"vllm_omni.diffusion.models.{self.module}"), self.transformer_class)

    def diffusers_class(self) -> Any:
        return getattr(importlib.import_module("diffusers"), self.transformer_class)


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def _flux(ours: bool, height: int, width: int) -> Inputs:
    rows, columns = height // 16, width // 16
    inputs: Inputs = {
        "hidden_states": _drawn(1, rows * columns, 64),
        "encoder_hidden_states": _drawn(1, 512, 4096),
        "pooled_projections": _drawn(1, 768),
        "timestep": torch.full((1,), 0.5, dtype=torch.bfloat16),
        "guidance": torch.full((1,), 3.5),
    }
    if ours:
        return inputs | {"img_shapes": ((0, rows, columns),)}
    axes = (torch.arange(1), torch.arange(rows), torch.arange(columns))
    return inputs | {"img_ids": torch.cartesian_prod(*axes).float(), "txt_ids": torch.zeros(512, 3)}


def _qwen_image(ours: bool, height: int, width: int) -> Inputs:
    rows, columns = height // 16, width // 16
    return {
        "hidden_states": _drawn(1, rows * columns, 64),
        "encoder_hidden_states": _drawn(1, 128, 3584),
        "timestep": torch.full((1,), 0.5, dtype=torch.bfloat16),
        "img_shapes": ((1, rows, columns),) if ours else [[(1, rows, columns)]],
    }


def _wan(ours: bool, height: int, width: int) -> Inputs:
    """81 frames."""
    return {
        "hidden_states": _drawn(1, 16, 21, height // 8, width // 8),
        "encoder_hidden_states": _drawn(1, 512, 4096),
        "timestep": torch.full((1,), 500.0),
    }


MODELS = {
    "flux": FullSizeModel("flux.1-dev", "FluxPipeline", "flux.flux_transformer", "FluxTransformer2DModel", _flux),
    "qwen-image": FullSizeModel(
        "qwen-image",
        "QwenImagePipeline",
        "qwen_image.qwen_image_transformer",
        "QwenImageTransformer2DModel",
        _qwen_image,
    ),
    "wan": FullSizeModel("wan2.2-t2v-a14b", "WanPipeline", "wan2_2.wan2_2_transformer", "WanTransformer3DModel", _wan),
}
