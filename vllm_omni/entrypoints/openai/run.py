"""A server's life: load, listen, and end without losing what it has accepted."""

from __future__ import annotations

import math
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.entrypoints.openai.app import create_app
from vllm_omni.entrypoints.openai.config import ServerConfig
from vllm_omni.entrypoints.openai.connections import SilentConnections
from vllm_omni.entrypoints.openai.fetch import MediaFetcher
from vllm_omni.entrypoints.openai.server import Server, served_name
from vllm_omni.entrypoints.openai.storage import Storage
from vllm_omni.errors import InvalidConfigError

# Of the time that a server has to end: the step that is being computed ends, and the process is taken down.
_SHARE_TO_CLOSE = 0.1
_LEAST_SECONDS_TO_CLOSE = 1.0


def bind(config: ServerConfig) -> socket.socket:
    """The socket that a server will listen on, taken before a model is loaded for nothing.

    Raises ``InvalidConfigError`` for an address that cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise _unavailable(config, error) from error
    return listener


def _unavailable(config: ServerConfig, error: OSError) -> InvalidConfigError:
    return InvalidConfigError(
        f"host={config.host!r}, port={config.port}: {error.strerror or error}; choose another", option="port"
    )


def open_storage(config: ServerConfig) -> Storage:
    """Where a server keeps jobs and results, opened before a model is loaded for nothing.

    Raises ``InvalidConfigError`` for a folder that cannot be used.
    """
    return Storage(config.storage_dir, max_age_s=3600 * config.retention_hours, max_bytes=1e9 * config.retention_gb)


class HttpServer(uvicorn.Server):
    """Serves ``omni`` on the socket of :func:`bind`, with the storage of :func:`open_storage`, until SIGTERM or SIGINT.

    From then on new requests are refused, what runs has ``drain_timeout_s`` to finish but for the last tenth, which
    closing takes, and :meth:`run` returns, so that the process exits with status 0. A second SIGINT ends at once.
    """

    def __init__(
        self, omni: AsyncOmni, config: ServerConfig, model: str | None, listener: socket.socket, storage: Storage
    ) -> None:
        self._listener = listener
        self._silent = SilentConnections(receive_timeout_s=config.body_timeout_s, send_timeout_s=config.send_timeout_s)
        self.state = Server(
            omni=omni,
            config=config,
            model_name=served_name(model, config, omni.od_config.model),
            storage=storage,
            media=MediaFetcher(config.allowed_media_domains),
        )
        super().__init__(
            uvicorn.Config(
                create_app(self.state),
                log_level="warning",
                server_header=False,
            )
        )

    @property
    def address(self) -> str:
        """Where it listens, as ``http://HOST:PORT``."""
        host, port = self._listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            # Until now another server could bind it too, and be the first to listen.
            self._listener.listen(self.config.backlog)
        except OSError as error:
            raise _unavailable(self.state.config, error) from error
        super().run([self._listener] if sockets is None else sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(f"serving {self.state.model_name} at {self.address}", flush=True)  # noqa: T201  # what a user waits for

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # tenths of a second
            self._silent.sweep(self.server_state.connections)
        if not await super().on_tick(counter):
            return False
        self._drain()
        # While requests are finished, whoever asks how far they are, ends one or sends a new one is answered.
        is_over = not self.state.omni.live.in_progress or time.monotonic() >= self.state.drain_until
        return self.force_exit or is_over

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain()
        self.config.timeout_graceful_shutdown = math.ceil(max(0.0, self.state.drain_until - time.monotonic()))
        await super().shutdown(sockets)
        self.state.media.close()
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
        self._drain()
        super().handle_exit(sig, frame)

    def _drain(self) -> None:
        if not self.state.is_draining:
            self.state.drain_until = time.monotonic() + _seconds_to_finish(self.state.config)
            self.state.is_draining = True


def _seconds_to_finish(config: ServerConfig) -> float:
    timeout_s = config.drain_timeout_s
    return max(0.0, timeout_s - max(_LEAST_SECONDS_TO_CLOSE, _SHARE_TO_CLOSE * timeout_s))
