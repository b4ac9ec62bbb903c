"""``/v1/audio``: for models of sound, of which there is none yet."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from vllm_omni.entrypoints.openai.errors import ApiError
from vllm_omni.entrypoints.openai.server import server_of

router = APIRouter(prefix="/v1/audio", tags=["audio"])


@router.post("/speech", status_code=501)
@router.post("/generate", status_code=501)
async def generate_audio(request: Request) -> Response:
    """Answers 501: the served model makes no sound."""
    server = server_of(request)
    raise ApiError(
        501,
        f"the model {server.model_name!r} makes {server.omni.output_kind}s, no sound; no model of sound exists yet",
        code="unsupported_model",
        param="model",
    )
