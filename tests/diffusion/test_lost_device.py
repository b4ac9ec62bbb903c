"""A device that computes no more in this process: the engine says so, rather than fail one request after another."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.errors import GenerationError
from vllm_omni.platforms.cpu import CpuPlatform

SMALL = OmniDiffusionSamplingParams(height=32, width=32, num_inference_steps=1)


def test_an_engine_whose_device_is_lost_is_not_alive(qwen_folder, monkeypatch):
    def lost(*_):
        raise RuntimeError("an illegal memory access was encountered")

    with Omni(str(qwen_folder)) as omni:
        engine = omni._engine
        monkeypatch.setattr(engine._executor._worker._runner.pipeline, "predict", lost)
        with pytest.raises(GenerationError, match="illegal memory access"):
            omni.generate("a cat", SMALL)
        assert (engine.is_alive, engine.num_ready) == (True, 1), "an error of a request alone"
        monkeypatch.setattr(CpuPlatform, "synchronize", lost)
        with pytest.raises(GenerationError, match="illegal memory access"):
            omni.generate("a cat", SMALL)
        assert (engine.is_alive, engine.num_ready) == (False, 0)
        monkeypatch.undo()


SCRIPT = """
import sys, torch
from vllm_omni import Omni, OmniDiffusionSamplingParams

omni = Omni(sys.argv[1], device="cuda", dtype="bfloat16")
engine = omni._engine
def predict(latents, timestep, conditions):
    return latents + latents.flatten()[torch.full((1,), 10**9, device="cuda")]
engine._executor._worker._runner.pipeline.predict = predict
try:
    omni.generate("a cat", OmniDiffusionSamplingParams(height=32, width=32, num_inference_steps=2))
except Exception as error:
    print("failed:", type(error).__name__)
print("alive:", engine.is_alive, engine.num_ready, flush=True)
"""


@pytest.mark.gpu
def test_a_gpu_that_met_an_assertion_of_its_own_is_lost(qwen_folder):
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(qwen_folder)], capture_output=True, text=True, timeout=120)
    assert "failed: GenerationError" in run.stdout, run.stderr
    assert "alive: False 0" in run.stdout, run.stderr
