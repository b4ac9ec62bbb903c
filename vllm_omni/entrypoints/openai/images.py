"""``/v1/images``: pictures from a text, and from pictures and a text."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.datastructures import FormData, UploadFile

from vllm_omni.entrypoints.openai.errors import ApiError
from vllm_omni.entrypoints.openai.pictures import answer
from vllm_omni.entrypoints.openai.protocol import PictureFields, from_form

router = APIRouter(prefix="/v1/images", tags=["images"])

_MAX_FILES = 16
_MAX_FIELDS = 100
_PICTURES = {"type": "string", "format": "binary", "description": "the picture to work on; repeat it for several"}


@router.post("/generations")
async def generate_images(body: PictureFields, request: Request) -> Response:
    """Pictures from a text."""
    return await answer(request, body, "image_generation")


def _edit_schema() -> dict[str, Any]:
    schema = PictureFields.model_json_schema(ref_template="#/components/schemas/{model}")
    mask = {"type": "string", "format": "binary", "description": "what may change, for a model that takes a mask"}
    schema["properties"] = {"image": _PICTURES, "mask": mask, **schema["properties"]}
    schema["required"] = ["image", *schema["required"]]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@router.post("/edits", openapi_extra=_edit_schema())
async def edit_images(request: Request) -> Response:
    """Pictures from one or several pictures and a text, as a form."""
    async with request.form(max_files=_MAX_FILES, max_fields=_MAX_FIELDS) as form:
        images, mask, fields = await _split(form)
    body = from_form(PictureFields, fields)
    if not images:
        raise ApiError(400, "image is missing; send it as a file", code="missing_required_parameter", param="image")
    return await answer(request, body, "image_edit", images, mask)


async def _split(form: FormData) -> tuple[list[bytes], bytes | None, list[tuple[str, str]]]:
    """Pictures, mask and texts of a form."""
    images: list[bytes] = []
    masks: list[bytes] = []
    fields: list[tuple[str, str]] = []
    for name, value in form.multi_items():
        if name in ("image", "image[]", "mask"):
            if not isinstance(value, UploadFile):
                raise ApiError(400, f"{name} must be a file", code="invalid_value", param=name.removesuffix("[]"))
            (masks if name == "mask" else images).append(await value.read())
        elif isinstance(value, UploadFile):
            raise ApiError(400, f"{name} must not be a file", code="invalid_value", param=name)
        else:
            fields.append((name, value))
    if len(masks) > 1:
        raise ApiError(400, "mask is given twice; give it once", code="invalid_value", param="mask")
    return images, masks[0] if masks else None, fields
