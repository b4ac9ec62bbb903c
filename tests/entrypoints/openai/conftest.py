from __future__ import annotations

import pytest

from tests import tiny_wan
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


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory):
    """A tiny checkpoint of text to video."""
    return tiny_wan.wan_t2v(tmp_path_factory.mktemp("checkpoints") / "video", num_experts=1)


@pytest.fixture(scope="session")
def video_server(video_folder, tmp_path_factory):
    """A server of videos with a folder of its own."""
    folder = tmp_path_factory.mktemp("storage")
    with AsyncOmni(str(video_folder)) as omni, running_server(omni, storage_dir=folder) as running:
        yield running
