"""Pictures that a request names by an address: data URLs, and what domains that the operator allows will serve.

A fetch must not reach into the network that the server stands in: the domain is on the list, every address that it
resolves to is public, the connection goes to an address that was checked, and redirects are refused. Nor may a host
that is slow, or that never ends, hold up the server: fetches have few threads of their own, and those of a request one
time and one number of bytes.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from vllm_omni.errors import InvalidRequestError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_NUM_THREADS = 4
_TIMEOUT_S = 10.0  # without a byte
_MAX_PICTURES = 16  # as many as files of a form
_MAX_SECONDS = 30.0  # for all pictures of a request
_MAX_BYTES = 32 * 2**20
_MAX_BYTES_IN_ALL = 64 * 2**20
_CHUNK_BYTES = 2**16
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class MediaFetcher:
    """Turns an address into the bytes of a file. Raises ``InvalidRequestError`` that names the field."""

    def __init__(self, allowed_domains: tuple[str, ...]) -> None:
        self._allowed = frozenset(domain.lower() for domain in allowed_domains)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="vllm-omni-fetch")

    async def fetch(self, urls: Sequence[str], param: str) -> list[bytes]:
        """All pictures of a request. Cancelling the call ends the download in progress."""
        if len(urls) > _MAX_PICTURES:
            raise InvalidRequestError(
                f"{param} has {len(urls)} pictures; at most {_MAX_PICTURES} are taken, so leave some out", param=param
            )
        download = _Download()
        try:
            return await asyncio.wait_for(self._fetch(urls, param, download), _MAX_SECONDS)
        except asyncio.TimeoutError as error:
            raise InvalidRequestError(
                f"{param}: its pictures could not be fetched within {_MAX_SECONDS:g} s; send them as data URLs",
                param=param,
            ) from error
        finally:
            download.end()

    def close(self) -> None:
        """Fetch nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _fetch(self, urls: Sequence[str], param: str, download: _Download) -> list[bytes]:
        loop, files = asyncio.get_running_loop(), []
        for url in urls:
            header = _DATA_URL.match(url)
            if header is None:
                files.append(await loop.run_in_executor(self._threads, self._download, url, param, download))
                continue
            try:
                files.append(base64.b64decode(url[header.end() :], validate=True))
            except binascii.Error as error:
                raise InvalidRequestError(f"{param} is a data URL that is not base64: {error}", param=param) from error
        return files

    def _download(self, url: str, param: str, download: _Download) -> bytes:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidRequestError(f"{param}={url[:80]!r} is no address: {error}", param=param) from error
        if parts.scheme not in ("http", "https") or not host:
            raise InvalidRequestError(
                f"{param}={url[:80]!r} must be a data URL (data:image/png;base64,...) or an http(s) address",
                param=param,
            )
        if host.lower() not in self._allowed:
            raise InvalidRequestError(
                f"{param}: nothing is fetched from {host!r}; send the picture as a data URL, or have the operator add"
                " the domain to --allowed-media-domains",
                param=param,
            )
        port = port or (443 if parts.scheme == "https" else 80)
        try:
            addresses = _public_addresses(host, port)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            return _get(parts.scheme, host, port, addresses, target, download)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise InvalidRequestError(f"{param}={url[:80]!r} cannot be fetched: {error}", param=param) from error


class _Download:
    """What the downloads of one request share: how much may still come, and an end for all of them."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._end_at = time.monotonic() + _MAX_SECONDS
        self._connection: socket.socket | None = None
        self._has_ended = False
        self._lock = threading.Lock()

    @contextmanager
    def using(self, connection: socket.socket) -> Iterator[None]:
        """Let :meth:`end` shut it, which wakes the thread that waits for it. Raises ``TimeoutError`` after the end."""
        with self._lock:
            self._check()
            self._connection = connection
        try:
            yield
        finally:
            with self._lock:
                self._connection = None

    def took(self, num_bytes: int) -> None:
        """Raises ``ValueError`` for more than may come, ``TimeoutError`` after the end."""
        with self._lock:
            self._num_bytes += num_bytes
            if self._num_bytes > _MAX_BYTES_IN_ALL:
                raise ValueError(f"the pictures of the request have more than {_MAX_BYTES_IN_ALL // 2**20} MB together")
            self._check()

    def end(self) -> None:
        with self._lock:
            self._has_ended = True
            if self._connection is not None:
                # What SSL adds to shutdown is not for another thread than the one that reads.
                with suppress(OSError):  # the host may have ended it
                    socket.socket.shutdown(self._connection, socket.SHUT_RDWR)

    def _check(self) -> None:
        if self._has_ended or time.monotonic() >= self._end_at:
            raise TimeoutError(f"it took longer than {_MAX_SECONDS:g} s, or nobody waits for it")


def _public_addresses(host: str, port: int) -> list[str]:
    """The addresses of ``host``, the preferred first. Raises ``ValueError`` if any of them is not public."""
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(_is_public(address) for address in found):
        raise ValueError("its domain leads to an address that is not public")
    return list(dict.fromkeys(found))


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.is_site_local:
            return False
        # Gateways take these to the address of version 4 within.
        if address in _NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        elif address.sixtofour is not None:
            address = address.sixtofour
    return address.is_global and not address.is_multicast and not address.is_reserved


def _connect(addresses: list[str], port: int, download: _Download) -> socket.socket:
    """A connection to the first of them that takes one: a machine may have no route to those of one version."""
    for address in addresses[:-1]:
        download.took(0)
        try:
            return socket.create_connection((address, port), timeout=_TIMEOUT_S)
        except OSError as error:
            logger.debug("%s cannot be reached: %s", address, error)
    return socket.create_connection((addresses[-1], port), timeout=_TIMEOUT_S)


def _get(scheme: str, host: str, port: int, addresses: list[str], target: str, download: _Download) -> bytes:
    """Get from the addresses that were checked: to resolve the name again could lead elsewhere."""
    raw = _connect(addresses, port, download)
    with raw:
        stream = raw
        if scheme == "https":
            context = ssl.create_default_context()
            stream = context.wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
        with stream, download.using(stream):
            if isinstance(stream, ssl.SSLSocket):
                stream.do_handshake()
            connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
            connection.sock = stream
            connection.request("GET", target, headers={"Accept": "image/*", "Connection": "close"})
            with connection.getresponse() as response:
                if response.status != 200:
                    advice = "redirects are not followed" if 300 <= response.status < 400 else "200 is needed"
                    raise ValueError(f"it answers {response.status}; {advice}")
                content = bytearray()
                while chunk := response.read(_CHUNK_BYTES):
                    download.took(len(chunk))
                    content += chunk
                    if len(content) > _MAX_BYTES:
                        raise ValueError(f"it has more than {_MAX_BYTES // 2**20} MB")
    return bytes(content)
