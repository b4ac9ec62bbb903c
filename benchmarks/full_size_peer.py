"""The diffusers pipeline of a full-size model with random weights, compiled, for ``full_size_generate.py``."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.peer_attention import provide_flash_attention_3

_COMPONENTS = ("transformer", "vae", "scheduler")


def compiled_peer(folder: Path, device: str) -> Callable[..., Any]:
    """The pipeline of ``folder`` without its text encoders, on its fastest attention backend."""
    provide_flash_attention_3()
    index = json.loads((folder / "model_index.json").read_text())
    diffusers = importlib.import_module("diffusers")
    pipeline_class = getattr(diffusers, index["_class_name"])
    parts: dict[str, Any] = dict.fromkeys(inspect.signature(pipeline_class).parameters)
    for name in _COMPONENTS:
        part_class = getattr(diffusers, index[name][1])
        config = part_class.load_config(str(folder / name))
        with torch.device("cpu" if name == "scheduler" else device):
            torch.set_default_dtype(torch.bfloat16)
            parts[name] = part_class.from_config(config)
            torch.set_default_dtype(torch.float32)
    pipeline = pipeline_class(**parts)
    pipeline.set_progress_bar_config(disable=True)
    if device.startswith("cuda"):
        pipeline.transformer.set_attention_backend("_flash_3")
    pipeline.transformer.compile_repeated_blocks(fullgraph=True)
    return torch.inference_mode()(pipeline)
