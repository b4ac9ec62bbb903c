"""Loading of what a pipeline takes from diffusers and transformers: autoencoders, text encoders, tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging as transformers_logging

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.encoders.channel_norm import use_squared_sums
from vllm_omni.diffusion.encoders.channels_last import use_channels_last
from vllm_omni.diffusion.layers.linear import LinearBase
from vllm_omni.diffusion.model_loader.weights import (
    AutoWeightsLoader,
    check_complete,
    iterate_weights,
    weight_files,
)
from vllm_omni.errors import InvalidModelFolderError, WeightsError


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating-point tensors have ``dtype`` within the block."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def load_autoencoder(model_class: Any, od_config: OmniDiffusionConfig, subfolder: str = "vae") -> Any:
    """An autoencoder of diffusers on the engine's device, in its dtype."""
    config = dict(od_config.component_config(subfolder))
    with torch.device(od_config.torch_device), default_dtype(od_config.torch_dtype):
        try:
            vae = model_class.from_config(config)
        except (TypeError, ValueError, LookupError) as error:
            name = model_class.__name__
            raise InvalidModelFolderError(f"{subfolder}/config.json makes no {name}: {error}") from error
    vae.requires_grad_(False).eval()
    if od_config.load_format == "dummy":
        fill_with_random_weights(vae)
    else:
        folder = Path(od_config.model) / subfolder
        files = weight_files(folder, fall_back_to_pt=True)
        loaded = AutoWeightsLoader(vae).load_weights(iterate_weights(files, od_config.torch_device))
        check_complete(vae.state_dict().keys(), loaded, str(folder))
    if od_config.torch_device.type == "cpu":
        use_squared_sums(vae)
    else:
        use_channels_last(vae)
    return vae


def decode_in_parts(pipeline: nn.Module, od_config: OmniDiffusionConfig) -> None:
    """Let the autoencoders of a pipeline, whoever loaded them, work by slices and tiles as configured."""
    modules: list[Any] = list(pipeline.modules())
    for module in modules:
        # diffusers gives the method to all of its autoencoders, and the attribute to those that can.
        if od_config.memory.vae_use_slicing and hasattr(module, "use_slicing") and hasattr(module, "enable_slicing"):
            module.enable_slicing()
        if od_config.memory.vae_use_tiling and hasattr(module, "use_tiling") and hasattr(module, "enable_tiling"):
            module.enable_tiling()


def load_text_encoder(model_class: Any, od_config: OmniDiffusionConfig, subfolder: str = "text_encoder") -> Any:
    """A model of transformers on the engine's device, in its dtype. Weights that are missing are an error."""
    folder = Path(od_config.model) / subfolder
    od_config.component_config(subfolder)  # says what is missing better than transformers does
    if od_config.load_format == "dummy":
        config = model_class.config_class.from_pretrained(folder)
        with torch.device(od_config.torch_device), default_dtype(od_config.torch_dtype):
            model = model_class(config)
        fill_with_random_weights(model)
        return model.requires_grad_(False).eval()
    weight_files(folder, fall_back_to_pt=True)  # raises if a file is missing
    try:
        with no_progress_bar():
            model, report = model_class.from_pretrained(
                folder, dtype=od_config.torch_dtype, output_loading_info=True, local_files_only=True
            )
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise WeightsError(f"{folder} cannot be loaded ({error}); download it again") from error
    check_complete(report["missing_keys"], set(), str(folder))
    return model.to(od_config.torch_device).requires_grad_(False).eval()


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keeps transformers and diffusers from drawing bars of their own, also where standard error is no terminal."""
    libraries = [logging for logging in (transformers_logging, diffusers_logging) if logging.is_progress_bar_enabled()]
    for logging in libraries:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in libraries:
            logging.enable_progress_bar()


def load_tokenizer(tokenizer_class: Any, od_config: OmniDiffusionConfig, subfolder: str = "tokenizer") -> Any:
    """A tokenizer of transformers, or None where random weights run without one and prompts come as embeddings."""
    return _load_processor(tokenizer_class, od_config, subfolder, "tokenizer")


def load_image_processor(processor_class: Any, od_config: OmniDiffusionConfig, subfolder: str = "processor") -> Any:
    """An image processor of transformers, or None where random weights run without one."""
    return _load_processor(processor_class, od_config, subfolder, "image processor")


def _load_processor(processor_class: Any, od_config: OmniDiffusionConfig, subfolder: str, noun: str) -> Any:
    folder = Path(od_config.model) / subfolder
    if not folder.is_dir():
        if od_config.load_format == "dummy":
            return None
        raise InvalidModelFolderError(f"{folder} is missing; a diffusers pipeline folder has it")
    try:
        return processor_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidModelFolderError(f"{folder} holds no {noun} that loads: {error}") from error


def fill_with_random_weights(module: nn.Module, seed: int = 0) -> None:
    """Random weights on the module's own device, small enough that activations stay finite through many layers.

    Vectors keep their values where the module set some: a norm's ones and a bias's zeros.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in module.named_parameters():
        generator = generators.get(parameter.device)
        if generator is None:
            generator = generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
        values = parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
        if parameter.dim() >= 2:
            fan_in = parameter.shape[1:].numel()
            layer = module.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, LinearBase) and not isinstance(parameter, DTensor):
                # As if it were loaded, for it may be quantized.
                drawn = torch.empty(parameter.shape, device=parameter.device).normal_(
                    0, fan_in**-0.5, generator=generator
                )
                layer.linear_method.store_weight(layer, drawn, 0)
            else:
                values.normal_(0, fan_in**-0.5, generator=generator)
        elif name.endswith("bias"):
            values.zero_()
        elif not bool(torch.isfinite(values).all()):
            values.fill_(1)
