"""The page at ``/``: static files of the package, which load nothing from elsewhere and talk to this server's API."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

from vllm_omni.entrypoints.openai.errors import ApiError

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parent / "static"
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FILES = {path.name: path for path in _FOLDER.iterdir() if path.suffix in _MEDIA_TYPES}
_HEADERS = {
    # Nothing inline, nothing from elsewhere, in nobody's frame. Pictures that were just made are blob: addresses,
    # previews are data: addresses.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:;"
        " media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    # A newer server brings a newer page.
    "Cache-Control": "no-cache",
}


@router.get("/")
async def page() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/ui/{name}")
async def page_file(name: str) -> Response:
    """A file that the page loads."""
    return _file(name)


def _file(name: str) -> Response:
    path = _FILES.get(name)
    if path is None:
        raise ApiError(404, f"the page has no file {name!r}", code="unknown_path")
    return FileResponse(path, media_type=_MEDIA_TYPES[path.suffix], headers=_HEADERS)
