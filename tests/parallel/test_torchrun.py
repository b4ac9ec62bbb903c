"""Every process of torchrun is a rank, and all get the pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_omni import AsyncOmni
from vllm_omni.errors import FeatureNotAvailableError

pytestmark = pytest.mark.parallel
ROOT = Path(__file__).parent.parent.parent

SCRIPT = """
import sys
from vllm_omni import Omni, OmniDiffusionSamplingParams
with Omni(device="cpu", ulysses_degree={degree}) as omni:
    params = OmniDiffusionSamplingParams(height=64, width=64, num_inference_steps=2)
    first = omni.generate(["a red circle", "a blue square"], params)
    second = omni.generate("a red circle", params)[0]
    # In one piece: the other process writes to the same pipe.
    sys.stdout.write(f"picture {{sum(first[0].images[0].tobytes())}} {{second.receipt.seeds[0]}}\\n")
"""


def run(tmp_path, degree):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(degree=degree))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_both_processes_have_the_same_picture_from_a_seed_that_was_drawn(tmp_path):
    done = run(tmp_path, 2)
    assert done.returncode == 0, done.stderr
    pictures = [line for line in done.stdout.splitlines() if line.startswith("picture")]
    assert len(pictures) == 2
    assert len(set(pictures)) == 1, "the same picture, and the same seed in its receipt"


def test_a_server_in_torchrun_is_refused(qwen_folder, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(FeatureNotAvailableError, match="start it without torchrun"):
        AsyncOmni(qwen_folder, device="cpu", tensor_parallel_size=2)


def test_a_product_that_is_not_the_number_of_processes_is_refused(tmp_path):
    done = run(tmp_path, 3)
    assert done.returncode != 0
    assert "ulysses_degree=3 needs 3 ranks, torchrun started 2 processes" in done.stderr
