"""``/files``: stored results by names that nobody can guess, as ``response_format=url`` gives them."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse

from vllm_omni.entrypoints.openai.errors import ApiError
from vllm_omni.entrypoints.openai.server import server_of

router = APIRouter(prefix="/files", tags=["files"])


@router.get("/{name}", response_class=FileResponse)
async def stored_file(name: str, request: Request) -> FileResponse:
    """A stored result. Whoever has its address needs no key, as a browser that shows it has none."""
    path = await asyncio.to_thread(server_of(request).storage.file, name)
    if path is None or path.suffix == ".input":
        raise ApiError(404, f"there is no file {name!r}; it may have expired", code="file_not_found", param="name")
    return FileResponse(path, headers={"Cache-Control": "private, max-age=3600"})
