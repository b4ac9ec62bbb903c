"""A pipeline that can be told to die, hang or run out of memory on one rank: ``prompt`` says where and when.

``"die 1"``: rank 1 kills itself in its second step, while the other waits for it in a collective. ``"slow decoding"``
and ``"no decoding"`` take their time over the picture, or have no memory for it.
"""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image import (
    QwenImagePipeline,
    get_qwen_image_post_process_func,
)

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
