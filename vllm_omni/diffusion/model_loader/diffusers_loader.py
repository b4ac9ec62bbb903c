"""Building a pipeline and filling it with its weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from vllm_omni.diffusion.attention.fp8 import attention_dtype, check_attention_dtype
from vllm_omni.diffusion.attention.selector import attention_backend, check_backend
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.groups import current_groups
from vllm_omni.diffusion.distributed.utils import local_device
from vllm_omni.diffusion.model_loader.components import decode_in_parts, default_dtype, fill_with_random_weights
from vllm_omni.diffusion.model_loader.utils import resolve_model_folder
from vllm_omni.diffusion.model_loader.weights import check_complete, iterate_weights, total_size, weight_files
from vllm_omni.diffusion.quantization import check_quantization, quantized_linears
from vllm_omni.errors import InsufficientMemoryError, WeightsError
from vllm_omni.platforms import get_platform

_Sources = Sequence["ComponentSource"]

# Told how many of how many bytes have been read.
LoadProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class ComponentSource:
    """Where the weights of one part of a pipeline come from.

    ``prefix`` is put before the names in the files, so that they name parameters of the pipeline.
    """

    model_or_path: str
    subfolder: str | None = None
    revision: str | None = None
    prefix: str = ""
    fall_back_to_pt: bool = True
    allow_patterns_overrides: Sequence[str] | None = None

    def files(self) -> list[Path]:
        """The weight files. Raises ``WeightsError`` if there are none."""
        folder = resolve_model_folder(self.model_or_path, self.revision) / (self.subfolder or "")
        return weight_files(folder, self.fall_back_to_pt, self.allow_patterns_overrides)


class DiffusersPipelineLoader:
    """Builds a pipeline on its device in its dtype, then streams the weights of its ``weights_sources`` into it."""

    ComponentSource: ClassVar[type[ComponentSource]] = ComponentSource

    def __init__(self, od_config: OmniDiffusionConfig, on_progress: LoadProgress | None = None) -> None:
        self.od_config = od_config
        self._on_progress = on_progress

    def load_model(
        self, pipeline_class: Callable[..., nn.Module], check: Callable[[nn.Module], None] | None = None
    ) -> nn.Module:
        """The pipeline, ready to run. Raises ``WeightsError`` or ``InsufficientMemoryError``.

        ``check`` sees the pipeline before its weights are read, and may refuse it.
        """
        config = self.od_config
        check_backend(config.attention_backend, config.torch_device)
        check_attention_dtype(config)
        check_quantization(config)
        if config.load_format == "auto":
            self._check_memory()
        use_hsdp = config.parallel_config.use_hsdp
        with (
            # With HSDP a transformer may be larger than the device: it is sharded from the host's memory.
            torch.device("cpu" if use_hsdp else config.torch_device),
            default_dtype(config.torch_dtype),
            local_device(config.torch_device),
            attention_backend(config.attention_backend),
            attention_dtype(config.attention_dtype),
            quantized_linears(config),
        ):
            pipeline = pipeline_class(od_config=config)
        decode_in_parts(pipeline, config)
        if check is not None:
            check(pipeline)
        sources: _Sources = getattr(pipeline, "weights_sources", ())
        if config.load_format == "dummy":
            # Parts are filled where they are, once they are there.
            for source in () if use_hsdp else sources:
                fill_with_random_weights(_submodule(pipeline, source.prefix))
        elif sources:
            self._load_weights(pipeline, sources)
        return pipeline.requires_grad_(False).eval()

    def _load_weights(self, pipeline: nn.Module, sources: _Sources) -> None:
        loaded: set[str] = pipeline.load_weights(self._stream(sources))  # type: ignore[operator]
        if loaded is None:
            raise WeightsError(
                f"{type(pipeline).__name__}.load_weights returned None; it must return the names of what it loaded"
            )
        for source in sources:
            expected = [name for name in pipeline.state_dict() if name.startswith(source.prefix)]
            check_complete(expected, loaded, f"{source.model_or_path}/{source.subfolder or ''}")

    def _stream(self, sources: _Sources) -> Iterator[tuple[str, torch.Tensor]]:
        files = [(source, path) for source in sources for path in source.files()]
        total = total_size(path for _, path in files)
        done = 0
        # Layers that are shared by ranks take their parts out of the mapped file: reading ahead would read it all.
        is_cut = self.od_config.parallel_config.use_hsdp or current_groups().tp.size > 1
        device = torch.device("cpu") if is_cut else self.od_config.torch_device
        for source, path in files:
            for name, tensor in iterate_weights([path], device):
                yield source.prefix + name, tensor
                done += tensor.numel() * tensor.element_size()
                if self._on_progress is not None:
                    self._on_progress(min(done, total), total)
        # The files' headers count as well.
        if self._on_progress is not None:
            self._on_progress(total, total)

    def _check_memory(self) -> None:
        """Refuse a model that cannot fit before anything is allocated."""
        config = self.od_config
        needed = _least_bytes(config)
        needed //= max(current_groups().tp.size, current_groups().weights.size)
        free = get_platform(config.torch_device).free_memory()
        if needed > free:
            raise InsufficientMemoryError(
                f"the weights of {config.model} take {needed / 2**30:.1f} GiB in {config.dtype}, {config.device} has"
                f" {free / 2**30:.1f} GiB free; use a smaller dtype, a larger device, or free memory"
            )


def _least_bytes(od_config: OmniDiffusionConfig) -> int:
    """What the weights take at least: which layers FP8 leaves in the model's dtype is known once they are built."""
    total = 0
    for folder in {path.parent for path in Path(od_config.model).glob("*/*.safetensors")}:
        try:
            files = weight_files(folder)
        except WeightsError:
            continue  # loading tells of files that are missing, if it needs them
        is_quantized = od_config.quantization is not None and folder.name.startswith("transformer")
        total += sum(_bytes_in(path, od_config.torch_dtype, is_quantized) for path in files)
    return total


def _bytes_in(path: Path, dtype: torch.dtype, is_quantized: bool) -> int:
    """Bytes of a safetensors file's tensors once they are in ``dtype``; floats of any width count as such.

    Of an ``is_quantized`` model, a number of a matrix takes one byte.
    """
    total = 0
    try:
        for name, entry in _safetensors_header(path).items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                width = _FLOAT_WIDTHS.get(entry["dtype"])
                own_width = 1 if is_quantized and len(entry["shape"]) == 2 else dtype.itemsize
                total += (stop - start) if width is None else (stop - start) // width * own_width
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is damaged: its header is not that of safetensors; download it again") from error
    return total


_FLOAT_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def _safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file. Raises ``WeightsError`` if it is damaged."""

    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
            return header
    except (OSError, ValueError, struct.error) as error:
        raise WeightsError(f"{path} is damaged or truncated ({error}); download it again") from error


def _submodule(pipeline: nn.Module, prefix: str) -> nn.Module:
    return pipeline.get_submodule(prefix.rstrip("."))
