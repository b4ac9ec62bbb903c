"""The application: routes, error form, gate."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from vllm_omni.entrypoints.openai import audio, chat, files, health, images, models, page, requests, videos
from vllm_omni.entrypoints.openai.errors import ApiError, install_error_handlers
from vllm_omni.entrypoints.openai.gate import Gate
from vllm_omni.entrypoints.openai.jobs import VideoJobs
from vllm_omni.entrypoints.openai.metrics import ServerMetrics
from vllm_omni.entrypoints.openai.server import Server
from vllm_omni.errors import nearest_name
from vllm_omni.version import __version__

_ROUTERS = tuple(part.router for part in (images, videos, chat, audio, models, requests, files, health, page))


async def _refuse_unknown_parameters(request: Request) -> None:
    """A parameter of the address that a route does not know is an error, as a field of a body is."""
    route = request.scope["route"]
    known = [parameter.alias for parameter in route.dependant.query_params]
    for name in request.query_params:
        if route.include_in_schema and name not in known:
            raise ApiError(
                400,
                f"unknown parameter {name!r} in the address; {nearest_name(name, known) if known else 'it takes none'}",
                code="invalid_value",
                param=name,
            )


def create_app(server: Server) -> ASGIApp:
    """The ASGI application of a server."""
    config, jobs = server.config, VideoJobs(server)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        jobs.start()
        yield
        server.is_draining = True
        await jobs.stop(server.drain_until - time.monotonic())

    app = FastAPI(
        lifespan=lifespan,
        dependencies=[Depends(_refuse_unknown_parameters)],
        title="vllm-omni",
        version=__version__,
        # The pages that FastAPI makes of the schema load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.state.server = server
    app.state.jobs = jobs
    app.state.metrics = metrics = ServerMetrics(server.omni)
    server.omni.listeners.append(metrics.observe_round)
    install_error_handlers(app)
    for router in _ROUTERS:
        app.include_router(router)
    gate: ASGIApp = Gate(app, config, metrics.observe_response)
    if config.allowed_origins:
        gate = CORSMiddleware(
            gate,
            allow_origins=list(config.allowed_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Receipt", "X-Should-Retry", "Retry-After"],
        )
    return gate
