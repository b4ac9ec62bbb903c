"""Pictures that a request names by an address: data URLs, and what domains that the operator allows will serve.

A fetch must not reach into the network that the server stands in: the domain is on the list, every address that it
resolves to is public, the connection goes to an address that was checked, and redirects are refused.
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
from urllib.parse import urlsplit

from vllm_omni.errors import InvalidRequestError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_TIMEOUT_S = 10.0
_MAX_BYTES = 32 * 2**20
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class MediaFetcher:
    """Turns an address into the bytes of a file. Raises ``InvalidRequestError`` that names the field."""

    def __init__(self, allowed_domains: tuple[str, ...]) -> None:
        self._allowed = frozenset(domain.lower() for domain in allowed_domains)

    async def fetch(self, url: str, param: str) -> bytes:
        header = _DATA_URL.match(url)
        if header is not None:
            try:
                return base64.b64decode(url[header.end() :], validate=True)
            except binascii.Error as error:
                raise InvalidRequestError(f"{param} is a data URL that is not base64: {error}", param=param) from error
        return await asyncio.to_thread(self._download, url, param)

    def _download(self, url: str, param: str) -> bytes:
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
            return _get(parts.scheme, host, port, addresses, target)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise InvalidRequestError(f"{param}={url[:80]!r} cannot be fetched: {error}", param=param) from error


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


def _connect(addresses: list[str], port: int) -> socket.socket:
    """A connection to the first of them that takes one: a machine may have no route to those of one version."""
    for address in addresses[:-1]:
        try:
            return socket.create_connection((address, port), timeout=_TIMEOUT_S)
        except OSError as error:
            logger.debug("%s cannot be reached: %s", address, error)
    return socket.create_connection((addresses[-1], port), timeout=_TIMEOUT_S)


def _get(scheme: str, host: str, port: int, addresses: list[str], target: str) -> bytes:
    """Get from the addresses that were checked: to resolve the name again could lead elsewhere."""
    raw = _connect(addresses, port)
    with raw:
        stream = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if scheme == "https" else raw
        with stream:
            connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
            connection.sock = stream
            connection.request("GET", target, headers={"Accept": "image/*", "Connection": "close"})
            with connection.getresponse() as response:
                if response.status != 200:
                    advice = "redirects are not followed" if 300 <= response.status < 400 else "200 is needed"
                    raise ValueError(f"it answers {response.status}; {advice}")
                content = response.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES // 2**20} MB")
    return content
