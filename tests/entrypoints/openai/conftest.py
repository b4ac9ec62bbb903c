from __future__ import annotations

import pytest

from tests.serving import running_server
from vllm_omni import AsyncOmni


@pytest.fixture(scope="session")
def shipped_omni():
    """The shipped model behind an engine's thread. Shared: a test leaves nothing in it."""
    with AsyncOmni(max_queue=64) as omni:
        yield omni


@pytest.fixture(scope="session")
def server(shipped_omni):
    """A server of the shipped model."""
    with running_server(shipped_omni) as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as openai_client:
        yield openai_client
