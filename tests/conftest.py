"""Fixtures that several test files share. Tiny checkpoints are built once per run."""

from __future__ import annotations

import os
from pathlib import Path

# Before any library reads them: no test may reach for the network, and logs of libraries are not under test.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["DIFFUSERS_VERBOSITY"] = "error"
# Without a GPU Triton's kernels run in its interpreter, if it is installed; it asks when it is imported.
os.environ.setdefault("TRITON_INTERPRET", str(int(not Path("/dev/nvidiactl").exists())))
os.environ.pop("DIFFUSION_ATTENTION_BACKEND", None)

import pytest
import torch

from tests import tiny
from vllm_omni import Omni

# The tensors are tiny: threads would spend their time waiting for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen-Image checkpoint; tests that damage it copy it first."""
    return tiny.qwen_image(tmp_path_factory.mktemp("checkpoints") / "qwen_image")


@pytest.fixture(scope="session")
def qwen_omni(qwen_folder: Path):
    """The tiny Qwen-Image, loaded. Shared: a test leaves nothing in it."""
    with Omni(str(qwen_folder)) as omni:
        yield omni


@pytest.fixture(autouse=True)
def _restore_torch_defaults():
    dtype = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == dtype, "a test or the code under test left another default dtype behind"
