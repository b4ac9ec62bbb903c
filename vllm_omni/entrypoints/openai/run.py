"""A server's life: load, listen, and end without losing what it has accepted."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.entrypoints.openai.app import create_app
from vllm_omni.entrypoints.openai.config import ServerConfig
from vllm_omni.entrypoints.openai.fetch import MediaFetcher
from vllm_omni.entrypoints.openai.server import Server, served_name
from vllm_omni.entrypoints.openai.storage import Storage


class HttpServer(uvicorn.Server):
    """Serves ``omni`` until SIGTERM or SIGINT.

    From then on nothing new is accepted, what runs has ``drain_timeout_s`` to finish, and :meth:`run` returns, so that
    the process exits with status 0. A second SIGINT ends at once.
    """

    def __init__(self, omni: AsyncOmni, config: ServerConfig, model: str | None) -> None:
        self.state = Server(
            omni=omni,
            config=config,
            model_name=served_name(model, config, omni.od_config.model),
            storage=Storage(
                config.storage_dir, max_age_s=3600 * config.retention_hours, max_bytes=1e9 * config.retention_gb
            ),
            media=MediaFetcher(config.allowed_media_domains),
        )
        super().__init__(
            uvicorn.Config(
                create_app(self.state),
                host=config.host,
                port=config.port,
                log_level="warning",
                timeout_graceful_shutdown=max(1, round(config.drain_timeout_s)),
                server_header=False,
            )
        )

    @property
    def address(self) -> str:
        """Where it listens, as ``http://HOST:PORT``. Known once it has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def startup(self, sockets: object = None) -> None:
        await super().startup()
        if self.started:
            print(f"serving {self.state.model_name} at {self.address}", flush=True)  # noqa: T201  # what a user waits for

    async def shutdown(self, sockets: object = None) -> None:
        self.state.is_draining = True
        await super().shutdown()
        self.state.storage.close()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but the signal is not raised again afterwards: it would end the process with its number."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.state.is_draining = True
        self.state.drain_until = time.monotonic() + self.state.config.drain_timeout_s
        super().handle_exit(sig, frame)
