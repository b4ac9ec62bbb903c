"""Command-line options, derived from the dataclasses that declare them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from vllm_omni.diffusion.data import engine_options
from vllm_omni.diffusion.engine.admission import Door
from vllm_omni.diffusion.engine.configure import configure
from vllm_omni.entrypoints.omni import choose_model
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt


def add_field_arguments(parser: Any, owners: Iterable[tuple[type, dataclasses.Field[Any]]]) -> None:
    """One option for each field: its name with dashes, its ``aliases``, its ``choices`` and its ``help``.

    A field with ``parse``, a function, reads its text by it. An option that is not given stays out of the result.
    Fields with ``cli=False`` have none; those of a feature that does not exist yet have one without help, so that
    asking for it gets the engine's answer.
    """
    for owner, field in owners:
        metadata = field.metadata
        if metadata.get("cli") is False:
            continue
        flags = [f"--{field.name.replace('_', '-')}", *metadata.get("aliases", ())]
        kind = metadata.get("parse") or _value_type(typing.get_type_hints(owner)[field.name])
        arguments: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        arguments["help"] = argparse.SUPPRESS if "planned" in metadata else _help(field)
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments |= {"type": kind, "choices": metadata.get("choices"), "metavar": _metavar(field, kind)}
        parser.add_argument(*flags, **arguments)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """``--size`` and one option for each sampling parameter."""
    parser.add_argument("--size", type=parse_size, metavar="WxH", help="size in pixels, as in 1024x768 or 512")
    group = parser.add_argument_group("sampling (absent: the model's defaults)")
    fields = dataclasses.fields(OmniDiffusionSamplingParams)
    add_field_arguments(group, [(OmniDiffusionSamplingParams, field) for field in fields])


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each option of the engine."""
    add_field_arguments(parser.add_argument_group("engine"), engine_options().values())


def sampling_values(given: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters among parsed arguments. Raises ``InvalidRequestError`` for a size given twice."""
    names = {field.name for field in dataclasses.fields(OmniDiffusionSamplingParams)}
    values = {name: value for name, value in given.items() if name in names}
    if given["size"] is not None:
        for name, value in zip(("width", "height"), given["size"], strict=True):
            if name in values:
                raise InvalidRequestError(f"--size and --{name} exclude each other; give one of them", param=name)
            values[name] = value
    return values


def engine_values(given: dict[str, Any]) -> dict[str, Any]:
    """The engine's options among parsed arguments."""
    return {name: given[name] for name in engine_options() if name in given}


def check_request(
    model: str | None,
    task: str | None,
    options: dict[str, Any],
    prompt: OmniPrompt,
    params: OmniDiffusionSamplingParams,
) -> Literal["image", "video"]:
    """What the model makes. Raises what is wrong with a request, the model and the options before weights are read."""
    door = Door(configure(choose_model(model, task), options, task))
    door.admit(prompt, params)
    return door.output_kind


def prompt_of(arguments: argparse.Namespace) -> OmniPrompt:
    """The prompt of ``prompt``, ``--negative-prompt`` and ``--image``."""
    prompt: OmniPrompt = {"prompt": arguments.prompt}
    if arguments.negative_prompt is not None:
        prompt["negative_prompt"] = arguments.negative_prompt
    if arguments.image is not None:
        # A prompt holds contents and never a path: the command reads the files that its user named.
        prompt["multi_modal_data"] = {"image": [read_picture(path) for path in arguments.image]}
    return prompt


def read_picture(path: Path) -> bytes:
    """The file of ``--image``. Raises ``InvalidRequestError`` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"--image {path} cannot be read: {error.strerror}", param="image") from error


def check_writable(option: str, path: Path) -> None:
    """Make the folder of a file before the work is done that the file is for. Raises ``InvalidRequestError``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(option, path, error.strerror or str(error)) from error
    if path.is_dir():
        raise InvalidRequestError(f"--{option} {path} is a folder; name a file in it", param=option.replace("-", "_"))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise not_written(option, path, "no permission")


def not_written(option: str, path: Path, reason: str) -> InvalidRequestError:
    """The error of a file that cannot be written."""
    return InvalidRequestError(
        f"--{option} {path} cannot be written: {reason}; name a file in another folder", param=option.replace("-", "_")
    )


def count(text: str) -> int:
    """A number of at least 1."""
    return _integer(text, 1)


def count_or_zero(text: str) -> int:
    """A number of at least 0."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    if not text.strip().isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least {least}")
    return int(text)


def json_object(text: str) -> dict[str, Any]:
    """An object in JSON, as shells pass it in single quotes."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error}); write '{{\"name\": 1}}'") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object; write '{{\"name\": 1}}'")
    return value


def parse_size(text: str) -> tuple[int, int]:
    """``"WIDTHxHEIGHT"`` or one number for a square, in pixels -> ``(width, height)``."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} must read WIDTHxHEIGHT in pixels, as in 1024x768")
    width = int(match[1])
    return width, int(match[2]) if match[2] else width


def _value_type(hint: Any) -> Any:
    """What reads an option's value: ``int | None -> int``, a literal -> ``str``, a mapping -> ``json_object``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    origin = typing.get_origin(hint)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return json_object
    return str if origin is typing.Literal else hint


def _help(field: dataclasses.Field[Any]) -> str:
    text = str(field.metadata["help"]).replace("%", "%%")
    return text if field.default in (None, dataclasses.MISSING) else f"{text} (default: {field.default})"


def _metavar(field: dataclasses.Field[Any], kind: Any) -> str | None:
    letters = {int: "N", float: "X", json_object: "JSON"}
    return None if field.metadata.get("choices") else letters.get(kind, field.name.upper())
