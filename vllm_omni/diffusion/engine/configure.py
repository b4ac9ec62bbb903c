"""From a model's name and flat options to the engine's configuration, with every default resolved."""

from __future__ import annotations

from typing import Any

import torch

from vllm_omni import envs
from vllm_omni.diffusion.data import DTYPES, OmniDiffusionConfig, check_option_names, read_json
from vllm_omni.diffusion.model_loader.utils import resolve_model_folder
from vllm_omni.diffusion.registry import resolve_diffusion_model
from vllm_omni.errors import InvalidConfigError, InvalidModelFolderError
from vllm_omni.platforms import default_device, get_platform


def configure(model: str, options: dict[str, Any], task: str | None = None) -> OmniDiffusionConfig:
    """The configuration for ``model``, a folder or a hub id, which is downloaded if it is not cached.

    A ``task`` is one of ``TASKS`` that the model must be able to do. The weights are downloaded last, when all that
    is asked for has been checked against the model's configuration files.

    Raises ``InvalidConfigError``, ``FeatureNotAvailableError``, ``ModelNotFoundError``, ``InvalidModelFolderError``,
    ``UnsupportedPipelineError`` or ``HubUnreachableError``.
    """
    check_option_names(options)
    if not isinstance(model, str):
        raise InvalidModelFolderError(f"model={model!r} must be the path of a folder or a hub id, as a string")
    options = dict(options)
    if options.get("attention_backend") is None:
        options["attention_backend"] = envs.attention_backend()
    device = _resolve_device(options.get("device"))
    options["device"] = str(device)
    options["dtype"] = _resolve_dtype(options.get("dtype"), device)
    folder = resolve_model_folder(model, options.get("revision"), weights=False)
    config = OmniDiffusionConfig.from_options(
        model=str(folder), model_class_name=_pipeline_class_name(folder / "model_index.json"), **options
    )
    spec = resolve_diffusion_model(config.model_class_name).request_spec(config)
    if task is not None:
        _check_task(task, config, () if spec is None else spec.tasks)
    if options.get("load_format") != "dummy":
        resolve_model_folder(model, options.get("revision"))
    return config


def _check_task(task: str, od_config: OmniDiffusionConfig, tasks: tuple[str, ...]) -> None:
    if task in tasks:
        return
    model = f"{od_config.model} ({od_config.model_class_name})"
    raise InvalidConfigError(
        f"task={task!r}: {model} does {', '.join(tasks)}; name another model, or another task"
        if tasks
        else f"task={task!r}: {model} does not say what it can do; leave the task out",
        option="task",
    )


def _pipeline_class_name(index_path: Any) -> str:
    index = read_json(index_path)
    class_name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(class_name, str):
        raise InvalidModelFolderError(f"{index_path} does not name its pipeline class in _class_name")
    return class_name


def _resolve_device(device: Any) -> torch.device:
    if device is None or device == "auto":
        return default_device()
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        raise InvalidConfigError(f"device={device!r} must be cpu, cuda or cuda:<index>", option="device") from None
    if parsed.type not in ("cpu", "cuda"):
        raise InvalidConfigError(f"device={device!r} must be cpu, cuda or cuda:<index>", option="device")
    if parsed.type == "cpu":
        return torch.device("cpu")
    index = 0 if parsed.index is None else parsed.index
    if index >= torch.cuda.device_count():
        raise InvalidConfigError(
            f"device={device!r}: this machine has {torch.cuda.device_count()} usable GPUs", option="device"
        )
    return torch.device("cuda", index)


def _resolve_dtype(dtype: Any, device: torch.device) -> Any:
    if dtype is None or dtype == "auto":
        dtype = get_platform(device).default_dtype
    names = {value: name for name, value in DTYPES.items()}
    return names.get(dtype, dtype) if isinstance(dtype, torch.dtype) else dtype
