"""A full-size transformer with one block of each kind, random weights, and inputs for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.full_size_models import MODELS
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.model_loader.components import default_dtype, fill_with_random_weights
from vllm_omni.diffusion.quantization import quantized_linears
from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs


def one_block(
    name: str, quantization: str | None, device: str = "cuda"
) -> tuple[nn.Module, dict[str, Any], OmniDiffusionConfig]:
    """The transformer in bfloat16, its inputs for 256 x 256, and the options that it was built with."""
    model = MODELS[name]
    config = model.transformer_config | {"num_layers": 1}
    config |= {"num_single_layers": 1} if "num_single_layers" in config else {}
    od_config = OmniDiffusionConfig.from_options(
        model=str(model.path), model_class_name="", device=device, dtype="bfloat16", quantization=quantization
    )
    with torch.device(device), default_dtype(torch.bfloat16), quantized_linears(od_config):
        transformer = model.our_class()(**get_transformer_config_kwargs(config, model.our_class()))
    fill_with_random_weights(transformer)
    inputs = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in model.inputs(True, 256, 256).items()
    }
    return transformer, inputs, od_config
