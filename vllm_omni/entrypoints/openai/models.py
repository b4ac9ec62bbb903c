"""``/v1/models``: the model that is served, and what its requests may say."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from vllm_omni.entrypoints.openai.server import Server, server_of

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
async def list_models(request: Request) -> dict[str, Any]:
    """The one model of this server, in a list."""
    return {"object": "list", "data": [_model(server_of(request))]}


@router.get("/{model:path}")
async def retrieve_model(model: str, request: Request) -> dict[str, Any]:
    """The model by its name."""
    server = server_of(request)
    server.check_model(model)
    return _model(server)


def _model(server: Server) -> dict[str, Any]:
    engine = server.omni.engine
    return {
        "id": server.model_name,
        "object": "model",
        "created": server.started,
        "owned_by": "vllm-omni",
        "output": engine.output_kind,
        "pipeline": engine.od_config.model_class_name,
        "takes_images": engine.takes_images,
        "shows_previews": engine.has_previews,
        "defaults": engine.request_defaults,
    }
