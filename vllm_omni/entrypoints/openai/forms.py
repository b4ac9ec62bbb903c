"""Bodies that come as forms (multipart/form-data): files, and fields that are texts or hold JSON."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Collection, Iterable
from typing import Any, Literal

from fastapi import Request
from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from vllm_omni.entrypoints.openai.errors import ApiError, validation_error
from vllm_omni.entrypoints.openai.protocol import StrictModel
from vllm_omni.entrypoints.openai.server import server_of

_MAX_FILES = 16
_MAX_FIELDS = 100

Files = dict[str, list[bytes]]
Fields = list[tuple[str, str]]

_Model = typing.TypeVar("_Model", bound=StrictModel)


def is_form(request: Request) -> bool:
    """Whether the body says that it is one."""
    return _content_type(request)[0] == b"multipart/form-data"


async def read_form(request: Request, file_names: Collection[str]) -> tuple[Files, Fields]:
    """The files of a form under their names, to which ``[]`` may be added, and its other fields.

    Raises ``ApiError`` for a body that is no form, and for files and texts in each other's place.
    """
    kind, options = _content_type(request)
    if kind != b"multipart/form-data":
        text = "the body must be a form, sent with the header Content-Type: multipart/form-data"
        raise ApiError(400, text, code="invalid_body", param="body")
    # Python would decode texts by whatever it knows by that name, punycode or escapes among them.
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise ApiError(400, "the charset of a form must be utf-8", code="invalid_body", param="body")
    max_size = server_of(request).config.max_body_mb * 2**20
    try:
        async with _in_small_letters(request).form(
            max_files=_MAX_FILES, max_fields=_MAX_FIELDS, max_part_size=max_size
        ) as form:
            return await _split(form, file_names)
    except HTTPException as error:
        if error.status_code != 400:
            raise
        raise ApiError(400, f"the form cannot be read: {error.detail}", code="invalid_body", param="body") from error


def from_form(model: type[_Model], fields: Iterable[tuple[str, str]]) -> _Model:
    """The fields as a body: those that are no texts hold JSON. Raises ``ApiError`` that names the field."""
    values: dict[str, Any] = {}
    for name, text in fields:
        if name in values:
            raise ApiError(400, f"{name} is given twice; give it once", code="invalid_value", param=name)
        field = model.model_fields.get(name)
        values[name] = text if field is None or _is_text(field.annotation) else _parsed(text)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise validation_error(list(error.errors())) from error


def _content_type(request: Request) -> tuple[bytes, dict[bytes, bytes]]:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    return kind.lower(), options


def _in_small_letters(request: Request) -> Request:
    """With the type of its body so written, the only way in which Starlette 1.7 knows it (the last for Python 3.10)."""
    headers = []
    for name, value in request.scope["headers"]:
        kind, separator, options = value.partition(b";")
        headers.append((name, kind.lower() + separator + options if name == b"content-type" else value))
    return Request({**request.scope, "headers": headers}, request.receive)


async def _split(form: FormData, file_names: Collection[str]) -> tuple[Files, Fields]:
    files: Files = {name: [] for name in file_names}
    fields: Fields = []
    for name, value in form.multi_items():
        plain = name.removesuffix("[]")
        if isinstance(value, UploadFile):
            if plain not in files:
                raise ApiError(400, f"{name} must not be a file", code="invalid_value", param=name)
            files[plain].append(await value.read())
        else:
            fields.append((name, value))
    return files, fields


def _is_text(annotation: Any) -> bool:
    """Whether a field's values are texts: ``str``, ``Literal["a", "b"]``, or one of them with None."""
    parts = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else None
    if parts is not None:
        return any(_is_text(part) for part in parts)
    return annotation is str or typing.get_origin(annotation) is Literal


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # the field's own check tells what it must be
