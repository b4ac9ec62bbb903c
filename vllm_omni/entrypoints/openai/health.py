"""``/health``, ``/ready`` and ``/metrics``: for those who watch over the server."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from vllm_omni.entrypoints.openai.errors import ApiError
from vllm_omni.entrypoints.openai.server import server_of

router = APIRouter(tags=["operation"])


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """200 while the engine takes steps, 503 if it has died."""
    if not server_of(request).omni.is_running:
        raise ApiError(503, "the engine has failed for good; start the server anew", code="engine_dead")
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, Any]:
    """200 while new requests are taken and can begin; 503 while workers start again or the server shuts down."""
    server = server_of(request)
    if server.is_draining or not server.omni.is_running:
        raise ApiError(503, "the server takes no more requests", code="shutting_down")
    num_ready = server.omni.engine.num_ready
    if not num_ready:
        raise ApiError(503, "the workers start again; requests wait for them", code="workers_starting")
    return {"status": "ready", "model": server.model_name, "replicas_ready": num_ready}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)
