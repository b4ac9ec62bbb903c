"""The transformer's configuration as keyword arguments of a model's class, as the model guide asks for it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from vllm_omni.errors import InvalidModelFolderError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)


def get_transformer_config_kwargs(tf_model_config: Mapping[str, Any], model_class: type) -> dict[str, Any]:
    """The entries of a transformer's ``config.json`` that ``model_class`` takes.

    Names that begin with an underscore are diffusers' own records. Another entry that the class does not take is
    reported once, since the checkpoint may need it. Raises ``InvalidModelFolderError`` for a value that is not of the
    type with which the class annotates its parameter.
    """
    parameters = inspect.signature(model_class).parameters
    entries = {name: value for name, value in tf_model_config.items() if not name.startswith("_")}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return entries
    for name in entries.keys() - parameters.keys():
        logger.warning("%s does not take %s=%r of config.json", model_class.__name__, name, entries[name])
    taken = {name: value for name, value in entries.items() if name in parameters}
    try:
        types = get_type_hints(model_class.__init__)  # type: ignore[misc]
    except NameError:  # a name that only type checkers import
        return taken
    for name in taken.keys() & types.keys():
        _check_value(name, taken[name], types[name])
    return taken


def _check_value(name: str, value: Any, expected: Any) -> None:
    try:
        TypeAdapter(expected, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError:
        kind = expected.__name__ if isinstance(expected, type) else str(expected).replace("collections.abc.", "")
        raise InvalidModelFolderError(f"config.json of the transformer: {name}={value!r} must be {kind}") from None
