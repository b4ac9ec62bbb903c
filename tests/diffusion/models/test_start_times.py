"""Requests of each family that start while others are in the middle of their steps give what they give alone."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests import tiny, tiny_flux, tiny_wan
from tests.parity import assert_same_latents
from vllm_omni import Omni, OmniDiffusionSamplingParams

VIDEO = {"num_frames": 5, "guidance_scale": 4.0}
FAMILIES = {
    "qwen": (tiny.qwen_image, {"true_cfg_scale": 3.0}),
    "flux": (tiny_flux.flux, {"true_cfg_scale": 2.0}),
    "kontext": (tiny_flux.flux_kontext, {"true_cfg_scale": 2.0, "extra_args": {"auto_resize": False}}),
    "wan t2v": (tiny_wan.wan_t2v, VIDEO),
    "wan ti2v": (tiny_wan.wan_ti2v, VIDEO),
    "wan i2v": (tiny_wan.wan_i2v, VIDEO),
}
# Prompt, negative prompt and number of steps of each request.
REQUESTS = [("a cat", "blurry", 6), ("a dog that holds a sign", "", 4), ("a cat on a mat", "a", 5)]
ROUNDS_BETWEEN = 2


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_that_start_at_different_times_give_what_they_give_alone(family, tmp_path):
    build, values = FAMILIES[family]
    with Omni(build(tmp_path / "model")) as omni:
        engine = omni._engine
        waiting = [engine.validate(prompt(omni, *texts), params(values, i)) for i, (*texts, _) in enumerate(REQUESTS)]
        order, outputs, most = [request.request_id for request in waiting], {}, 0
        num_rounds = 0
        while waiting or engine.has_requests:
            if waiting and num_rounds % ROUNDS_BETWEEN == 0:
                engine.add_request(waiting.pop(0))
            done = engine.step()
            most = max(most, len({event.step for event in done.progress}))
            outputs |= {output.request_id: output for output in done.outputs}
            num_rounds += 1
        assert most == len(REQUESTS), "requests must be at different steps of one round, else this proves nothing"
        for i, (*texts, _) in enumerate(REQUESTS):
            alone = omni.generate(prompt(omni, *texts), params(values, i))[0]
            assert_same_latents(torch.stack(outputs[order[i]].images), torch.stack(alone.images), 2e-5)


def prompt(omni, text, negative):
    given = {"prompt": text, "negative_prompt": negative}
    needs_picture = omni._engine.takes_images and "text-to-video" not in omni._engine._spec.tasks
    return given | ({"multi_modal_data": {"image": Image.new("RGB", (32, 32), "red")}} if needs_picture else {})


def params(values, index):
    return OmniDiffusionSamplingParams(
        height=32, width=32, seed=index, num_inference_steps=REQUESTS[index][2], output_type="latent", **values
    )
