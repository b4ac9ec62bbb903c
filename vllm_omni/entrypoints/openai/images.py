"""``/v1/images``: pictures from a text, and from pictures and a text."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from vllm_omni.entrypoints.openai.errors import ApiError
from vllm_omni.entrypoints.openai.forms import from_form, read_form
from vllm_omni.entrypoints.openai.pictures import answer
from vllm_omni.entrypoints.openai.protocol import PictureFields

router = APIRouter(prefix="/v1/images", tags=["images"])

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
    files, fields = await read_form(request, ("image", "mask"))
    for name, _ in fields:
        if name.removesuffix("[]") in files:
            raise ApiError(400, f"{name} must be a file", code="invalid_value", param=name.removesuffix("[]"))
    body = from_form(PictureFields, fields)
    images, masks = files["image"], files["mask"]
    if not images:
        raise ApiError(400, "image is missing; send it as a file", code="missing_required_parameter", param="image")
    if len(masks) > 1:
        raise ApiError(400, "mask is given twice; give it once", code="invalid_value", param="mask")
    return await answer(request, body, "image_edit", images, masks[0] if masks else None)
