"""Connections that hold a place for nothing: whose request does not come, or whose answer is not read."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any


class SilentConnections:
    """Ends connections of uvicorn on which nothing moves while no route works for them.

    uvicorn waits for the head of a request, and for a client that leaves the last part of its answer unread, for ever;
    each holds a file descriptor, and once there are none left nobody else is let in. What a route waits for, the gate
    limits.
    """

    def __init__(self, *, receive_timeout_s: float, send_timeout_s: float) -> None:
        self._receive_timeout_s = receive_timeout_s
        self._send_timeout_s = send_timeout_s
        self._silent: dict[Any, tuple[Any, int, float]] = {}  # its last request, bytes to send, since when

    def sweep(self, connections: Iterable[Any]) -> None:
        """To be called every second or so, with all connections that there are."""
        now = time.monotonic()
        silent = {}
        for connection in connections:
            if not hasattr(connection, "cycle"):  # it speaks HTTP/2, where several requests share a connection
                continue
            cycle, transport = connection.cycle, connection.transport
            if cycle is not None and not cycle.response_complete and not transport.is_closing():
                continue
            num_unsent = transport.get_write_buffer_size()
            before = self._silent.get(connection)
            since = before[2] if before is not None and before[:2] == (cycle, num_unsent) else now
            silent[connection] = (cycle, num_unsent, since)
            if now - since > (self._send_timeout_s if num_unsent else self._receive_timeout_s):
                transport.abort()
        self._silent = silent
