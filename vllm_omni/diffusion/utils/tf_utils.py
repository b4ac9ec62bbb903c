"""The transformer's configuration as keyword arguments of a model's class, as the model guide asks for it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from vllm_omni.logger import init_logger

logger = init_logger(__name__)


def get_transformer_config_kwargs(tf_model_config: Mapping[str, Any], model_class: type) -> dict[str, Any]:
    """The entries of a transformer's ``config.json`` that ``model_class`` takes.

    Names that begin with an underscore are diffusers' own records. Another entry that the class does not take is
    reported once, since the checkpoint may need it.
    """
    parameters = inspect.signature(model_class).parameters
    entries = {name: value for name, value in tf_model_config.items() if not name.startswith("_")}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return entries
    for name in entries.keys() - parameters.keys():
        logger.warning("%s does not take %s=%r of config.json", model_class.__name__, name, entries[name])
    return {name: value for name, value in entries.items() if name in parameters}
