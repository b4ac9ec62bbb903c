"""Pictures by address: only from where the operator allows, and never from within."""

from __future__ import annotations

import asyncio
import http.server
import socket
import threading
import time

import pytest

from vllm_omni.entrypoints.openai import fetch
from vllm_omni.entrypoints.openai.fetch import MediaFetcher
from vllm_omni.errors import InvalidRequestError


class Site(http.server.BaseHTTPRequestHandler):
    left = threading.Semaphore(0)  # a client went away from an answer without an end

    def do_GET(self):
        if self.path in ("/endless", "/endless-head"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if self.path == "/endless" else b"X-Slow: "))
            try:
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.02)
            except OSError:
                self.left.release()
            return
        redirects = self.path.startswith("/redirect")
        self.send_response(302 if redirects else 200)
        if redirects:
            self.send_header("Location", "http://127.0.0.1/secret")
        self.end_headers()
        self.wfile.write(b"x" * 2000 if self.path == "/large" else b"picture of " + self.headers["Host"].encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def port():
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield site.server_address[1]
    site.shutdown()
    site.server_close()


def get(url, *allowed):
    return asyncio.run(MediaFetcher(allowed).fetch([url], "image"))[0]


@pytest.fixture
def resolves(monkeypatch):
    """Let every name lead to these addresses."""

    def to(*addresses):
        entries = [(0, 0, 0, "", (address, 0)) for address in addresses]
        monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *_, **__: entries)

    return to


@pytest.fixture
def leads_here(port, resolves, monkeypatch):
    """Let every name lead to the site of this test."""

    def here(address, timeout):
        connection = socket.socket()
        connection.settimeout(timeout)
        connection.connect(("127.0.0.1", port))
        return connection

    resolves("93.184.216.34")
    monkeypatch.setattr(fetch.socket, "create_connection", here)


@pytest.mark.parametrize("path", ["endless", "endless-head"])
def test_a_host_that_never_ends_is_left_when_the_time_of_the_request_is_over(leads_here, monkeypatch, path):
    monkeypatch.setattr(fetch, "_MAX_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(InvalidRequestError, match=r"could not be fetched within 0\.3 s"):
        get(f"http://pictures.test/{path}", "pictures.test")
    assert time.monotonic() - start < 5
    assert Site.left.acquire(timeout=5), "its thread is free again"


def test_a_request_that_is_given_up_ends_its_download(leads_here):
    async def leave():
        fetching = asyncio.ensure_future(
            MediaFetcher(("pictures.test",)).fetch(["http://pictures.test/endless"], "image")
        )
        await asyncio.sleep(0.3)
        fetching.cancel()
        await asyncio.wait([fetching])

    asyncio.run(leave())
    assert Site.left.acquire(timeout=5)


def test_the_pictures_of_a_request_are_bounded_together(leads_here, monkeypatch):
    url = "http://pictures.test/a.png"  # 24 bytes
    monkeypatch.setattr(fetch, "_MAX_BYTES_IN_ALL", 50)
    fetcher = MediaFetcher(("pictures.test",))
    assert len(asyncio.run(fetcher.fetch([url] * 2, "image"))) == 2
    with pytest.raises(InvalidRequestError, match="more than 0 MB together"):
        asyncio.run(fetcher.fetch([url] * 3, "image"))
    with pytest.raises(InvalidRequestError, match="image has 17 pictures; at most 16 are taken"):
        asyncio.run(fetcher.fetch(["http://elsewhere.test/"] * 17, "image"))


def test_fetches_have_threads_of_their_own(leads_here, monkeypatch):
    names, found = [], socket.getaddrinfo

    def resolve(*args, **options):
        names.append(threading.current_thread().name)
        return found(*args, **options)

    monkeypatch.setattr(fetch.socket, "getaddrinfo", resolve)
    assert get("http://pictures.test/a.png", "pictures.test")
    assert names[0].startswith("vllm-omni-fetch")


def test_an_allowed_domain_is_fetched_from_the_address_that_was_checked(port, resolves, monkeypatch):
    resolves("93.184.216.34")
    asked = []

    def here(address, timeout):
        asked.append(address[0])
        connection = socket.socket()
        connection.connect(("127.0.0.1", port))
        return connection

    monkeypatch.setattr(fetch.socket, "create_connection", here)
    assert get("http://pictures.test/a.png?size=1", "pictures.test") == b"picture of pictures.test"
    assert asked == ["93.184.216.34"]
    with pytest.raises(InvalidRequestError, match="redirects are not followed"):
        get("http://pictures.test/redirect", "pictures.test")
    monkeypatch.setattr(fetch, "_MAX_BYTES", 1000)
    with pytest.raises(InvalidRequestError, match="more than"):
        get("http://pictures.test/large", "pictures.test")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "192.168.1.1",
        "224.0.0.1",
        "::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::127.0.0.1",
        "64:ff9b::127.0.0.1",
        "64:ff9b:1::10.0.0.1",
        "2002:7f00:1::",
    ],
)
def test_a_domain_that_leads_within_is_refused_even_if_it_is_allowed(resolves, address):
    resolves("93.184.216.34", address)
    with pytest.raises(InvalidRequestError, match="not public"):
        get("http://pictures.test/a.png", "pictures.test")


def test_an_address_that_cannot_be_reached_is_passed_over(port, resolves, monkeypatch):
    resolves("64:ff9b::93.184.216.34", "93.184.216.34")
    asked = []

    def here(address, timeout):
        asked.append(address[0])
        if ":" in address[0]:
            raise OSError("no route")
        connection = socket.socket()
        connection.connect(("127.0.0.1", port))
        return connection

    monkeypatch.setattr(fetch.socket, "create_connection", here)
    assert get("http://pictures.test/a.png", "pictures.test") == b"picture of pictures.test"
    assert asked == ["64:ff9b::93.184.216.34", "93.184.216.34"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://other.test/a.png", "nothing is fetched from 'other.test'"),
        ("http://pictures.test@other.test/", "'other.test'"),
        ("http://sub.pictures.test/", "'sub.pictures.test'"),
        ("http://[::1", "no address"),
        ("ftp://pictures.test/a.png", "http"),
        ("file:///etc/passwd", "http"),
        ("/etc/passwd", "http"),
        ("data:image/png;base64,%%%", "base64"),
        ("data:text/html;base64,AAAA", "http"),
    ],
)
def test_other_addresses_are_refused(url, message):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        get(url, "pictures.test")
    assert caught.value.param == "image"


def test_a_data_url_needs_no_domain():
    assert get("data:image/png;base64,aGVsbG8=") == b"hello"
