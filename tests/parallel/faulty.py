"""A pipeline that can be told to die, hang or run out of memory on one rank: ``prompt`` says where and when.

``"die 1"``: rank 1 kills itself in its second step, while the other waits for it in a collective. ``"slow decoding"``
and ``"no decoding"`` take their time over the picture, or have no memory for it.
"""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image import (
    QwenImagePipeline,
    get_qwen_image_post_process_func,
)
from vllm_omni.diffusion.registry import register_diffusion_model
from vllm_omni.errors import GenerationError

get_faulty_post_process_func = get_qwen_image_post_process_func


class FaultyPipeline(QwenImagePipeline):
    fault: str | None = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.decodings = {}  # by request: its prompt

    def prepare(self, request):
        words = str(request.prompt.get("prompt")).split()
        rank = dist.get_rank() if dist.is_initialized() else 0
        if words[0] in ("die", "hang", "stop", "oom", "fail") and rank == int(words[1]):
            self.fault = words[0]
        self.decodings[request.request_id] = request.prompt.get("prompt")
        return super().prepare(request)

    def predict(self, latents, timestep, conditions):
        fault, self.fault = self.fault, None
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "hang":
            time.sleep(3600)
        if fault == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if fault == "fail":
            raise ArithmeticError("this rank counts otherwise")
        return super().predict(latents, timestep, conditions)

    def decode(self, state):
        words = self.decodings.get(state.request_id)
        if words == "slow decoding":
            time.sleep(1.0)
        if words == "no decoding":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().decode(state)


def faulty_folder(folder_of_class):
    """The folder of a tiny model of this pipeline, which is registered."""
    register_diffusion_model(
        "FaultyPipeline", f"{__name__}:FaultyPipeline", post_process_func="get_faulty_post_process_func"
    )
    return folder_of_class("FaultyPipeline")


def params(**values):
    values = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 1, "output_type": "latent", **values}
    return OmniDiffusionSamplingParams(**values)


def assert_serves(omni, expected):
    assert torch.equal(omni.generate("a red circle", params())[0].images[0], expected)


def assert_named_when_it_hangs(folder, faults=("hang", "stop"), **options):
    """The second of two ranks hangs, and then is stopped: each is told in 10 seconds, and the next request succeeds."""
    causes = {"hang": "hangs", "stop": "has given no sign of life"}
    with Omni(str(folder), **options) as omni:
        expected = omni.generate("a red circle", params())[0].images[0]
        for fault in faults:
            started = time.monotonic()
            with pytest.raises(GenerationError, match=f"rank 1 of 2 {causes[fault]}"):
                omni.generate(f"{fault} 1", params())
            assert time.monotonic() - started < 10
            assert_serves(omni, expected)
