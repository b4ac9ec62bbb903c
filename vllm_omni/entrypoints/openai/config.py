"""What a server is told when it starts. The options of ``vllm-omni serve`` are derived from it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_omni.errors import InvalidConfigError


def _option(default: Any, help_text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **extra})


def _names(text: str) -> tuple[str, ...]:
    """``"a, b" -> ("a", "b")``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where a server listens, who may use it, and how much it takes."""

    host: str = _option("127.0.0.1", "address to listen on; 0.0.0.0 is every interface")
    port: int = _option(8091, "port to listen on; 0 chooses a free one")
    served_model_name: str | None = _option(
        None, "the model's name in the API; absent: the hub id or the folder's name"
    )
    api_key: str | None = _option(
        None, "key that clients must send as 'Authorization: Bearer KEY'; absent: VLLM_OMNI_API_KEY, else no key"
    )
    max_queue: int = _option(256, "most requests that wait; a further one is answered 429 with Retry-After")
    max_body_mb: int = _option(64, "most megabytes of a request's body")
    max_uploads_mb: int = _option(
        1024, "most megabytes of all bodies in hand together; a further one is answered 503 with Retry-After"
    )
    body_timeout_s: float = _option(30.0, "seconds that a client may pause while it sends a request")
    send_timeout_s: float = _option(60.0, "seconds that a client may leave a part of an answer unread")
    allowed_origins: tuple[str, ...] = _option(
        (), "web origins that browsers may call from, separated by commas; absent: none (CORS is off)", parse=_names
    )
    allowed_media_domains: tuple[str, ...] = _option(
        (), "domains from which pictures are fetched, separated by commas; absent: none", parse=_names
    )
    drain_timeout_s: float = _option(
        30.0,
        "seconds in which the server ends after SIGTERM; requests in progress have nine tenths of them",
        aliases=("--drain-timeout",),
    )
    storage_dir: Path | None = _option(None, "folder for video jobs and stored results; absent: a temporary one")
    retention_hours: float = _option(24.0, "hours that stored results are kept")
    retention_gb: float = _option(10.0, "gigabytes of stored results that are kept; the oldest go first")

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if isinstance(value, bool) or (isinstance(value, (int, float)) and not 0 <= value < float("inf")):
                raise InvalidConfigError(f"{option.name}={value!r} must be a number of at least 0", option=option.name)
        for name in ("max_queue", "max_body_mb"):
            if getattr(self, name) < 1:
                raise InvalidConfigError(f"{name}={getattr(self, name)} must be at least 1", option=name)
        if self.max_uploads_mb < self.max_body_mb:
            raise InvalidConfigError(
                f"max_uploads_mb={self.max_uploads_mb} must be at least max_body_mb={self.max_body_mb}, which one"
                " request may send",
                option="max_uploads_mb",
            )
        if self.port > 65535:
            raise InvalidConfigError(f"port={self.port} must lie between 0 and 65535", option="port")
        if self.api_key is not None and not self.api_key.strip():
            raise InvalidConfigError("api_key is empty; give a key, or leave it out", option="api_key")
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            text = "api_key must hold letters, digits and signs of ASCII alone, and no space; no header carries others"
            raise InvalidConfigError(text, option="api_key")
