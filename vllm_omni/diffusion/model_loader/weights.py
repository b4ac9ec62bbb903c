"""Reading weight files, and putting them into a model one tensor at a time."""

from __future__ import annotations

import json
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from vllm_omni.diffusion.layers.linear import WeightLoader
from vllm_omni.diffusion.layers.linear_method import copy_weight
from vllm_omni.errors import WeightsError

_MAX_LISTED = 20
_NUM_READERS = min(8, os.cpu_count() or 1)


def weight_files(
    folder: Path, fall_back_to_pt: bool = False, allow_patterns: Sequence[str] | None = None
) -> list[Path]:
    """The weight files of a component. Raises ``WeightsError`` if there are none, or if one of an index is missing."""
    if not folder.is_dir():
        raise WeightsError(f"{folder} is missing: there are no weights to load")
    if allow_patterns is not None:
        files = sorted({path for pattern in allow_patterns for path in folder.glob(pattern)})
    else:
        files = _indexed_files(folder) or sorted(folder.glob("*.safetensors"))
        if not files and fall_back_to_pt:
            files = sorted(folder.glob("*.bin"))
    if not files:
        kinds = "*.safetensors or *.bin" if fall_back_to_pt else "*.safetensors"
        raise WeightsError(f"{folder} holds no {kinds}; download the weights, or use load_format='dummy'")
    return files


def _indexed_files(folder: Path) -> list[Path]:
    """The files that a sharded checkpoint's index names, if there is one."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        return []
    try:
        names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{indices[0]} is not a valid index: {error!r}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise WeightsError(f"{folder} lacks {', '.join(missing)}, which {indices[0].name} names; download them again")
    return [folder / name for name in names]


def iterate_weights(
    files: Iterable[Path], device: torch.device | None = None, num_readers: int = _NUM_READERS
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of weight files, in order, a few in memory at a time. Pickled files load as plain weights only.

    For a GPU, the ``device`` that the weights are for, ``num_readers`` threads read ahead into memory that the GPU can
    copy from by itself: one thread reads a file slower than the bus is.
    """
    reads_ahead = device is not None and device.type == "cuda"
    with ThreadPoolExecutor(num_readers, "weights") as readers:
        for path in files:
            with _explained(path):
                if path.suffix != ".safetensors":
                    yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()
                    continue
                with safe_open(path, framework="pt") as file:
                    names = list(file.keys())
                    if reads_ahead:
                        yield from _read_ahead(names, partial(_pinned, file), readers, num_readers)
                    else:
                        yield from ((name, file.get_tensor(name)) for name in names)


def _read_ahead(
    names: Sequence[str], read: Callable[[str], torch.Tensor], readers: ThreadPoolExecutor, num_ahead: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """``names`` in order with what ``read`` gives for each; the next ``num_ahead`` are being read meanwhile."""
    pending: deque[tuple[str, Future[torch.Tensor]]] = deque()
    try:
        for name in names:
            pending.append((name, readers.submit(read, name)))
            if len(pending) > num_ahead:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        # Whoever stopped early closes the file, which must not be in use then.
        for _, future in pending:
            future.cancel()
        wait([future for _, future in pending])


def _pinned(file: Any, name: str) -> torch.Tensor:
    tensor: torch.Tensor = file.get_tensor(name)  # not read yet: its memory is the file
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What reading ``path`` raises, as a ``WeightsError``."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is damaged, or holds more than plain tensors, which could run code and is never loaded;"
            " convert it to safetensors"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise WeightsError(f"{path} is damaged or truncated ({error}); download it again") from error


def total_size(files: Iterable[Path]) -> int:
    """Bytes of weight files on disk."""
    return sum(path.stat().st_size for path in files)


class AutoWeightsLoader:
    """Puts named tensors into a module's parameters and buffers.

    A parameter's own ``weight_loader`` is used where there is one. A layer that was fused from several layers of the
    checkpoint names them in ``checkpoint_names``, and their tensors find their way by that.
    """

    def __init__(self, module: nn.Module, *, skip_prefixes: Sequence[str] = ()) -> None:
        self._targets: dict[str, torch.Tensor] = dict(module.named_parameters())
        persistent = module.state_dict(keep_vars=True).keys()
        self._targets |= {name: buffer for name, buffer in module.named_buffers() if name in persistent}
        self._parts = _fused_parts(module)
        self._skip_prefixes = tuple(skip_prefixes)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load all ``weights``; returns the names of the module's tensors that are complete.

        Raises ``WeightsError`` that lists the names which the module does not have or whose shapes do not fit.
        """
        loaded: set[str] = set()
        seen_parts: dict[str, set[str]] = {}
        unexpected: list[str] = []
        misshapen: list[str] = []
        for name, tensor in weights:
            if self._skip_prefixes and name.startswith(self._skip_prefixes):
                continue
            target_name, part = self._parts.get(name, (name, None))
            if target_name not in self._targets:
                unexpected.append(name)
                continue
            try:
                _load_one(self._targets[target_name], tensor, part)
            except ValueError as error:
                misshapen.append(f"{name}: {error}")
                continue
            if part is None:
                loaded.add(target_name)
            else:
                seen_parts.setdefault(target_name, set()).add(part)
        loaded |= {name for name, parts in seen_parts.items() if parts == self._parts_of(name)}
        _raise_for(unexpected=unexpected, misshapen=misshapen)
        return loaded

    def _parts_of(self, target_name: str) -> set[str]:
        return {part for name, part in self._parts.values() if name == target_name}


def check_complete(expected: Iterable[str], loaded: set[str], source: str) -> None:
    """Raises ``WeightsError`` that lists the expected tensors which were not loaded."""
    missing = sorted(set(expected) - loaded)
    if missing:
        raise WeightsError(f"{source} lacks weights that the model needs: {_listed(missing)}")


def _load_one(target: torch.Tensor, tensor: torch.Tensor, part: str | None) -> None:
    loader: WeightLoader | None = getattr(target, "weight_loader", None)
    if loader is None:
        copy_weight(target, tensor)
    else:
        assert isinstance(target, nn.Parameter), "only parameters carry a weight_loader"
        loader(target, tensor, part)


def _fused_parts(module: nn.Module) -> dict[str, tuple[str, str]]:
    """Checkpoint name of each part of a fused layer -> (name of the fused parameter, name of the part)."""
    parts: dict[str, tuple[str, str]] = {}
    for path, layer in module.named_modules():
        parent = path.rpartition(".")[0]
        for part in getattr(layer, "checkpoint_names", ()):
            for kind, parameter in layer.named_parameters(recurse=False):
                assert parameter is not None
                source = f"{parent}.{part}.{kind}" if parent else f"{part}.{kind}"
                parts[source] = (f"{path}.{kind}", part)
    return parts


def _raise_for(*, unexpected: list[str], misshapen: list[str]) -> None:
    problems = []
    if unexpected:
        problems.append(f"weights that the model does not have: {_listed(unexpected)}")
    if misshapen:
        problems.append(f"weights of the wrong shape: {_listed(misshapen)}")
    if problems:
        raise WeightsError("; ".join(problems))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
