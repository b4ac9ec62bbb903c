"""Pictures over HTTP, by the official client."""

from __future__ import annotations

import base64
import io
import json
import time

import numpy as np
import openai
import pytest
from PIL import Image

from tests.serving import SMALL
from vllm_omni import OmniDiffusionSamplingParams
from vllm_omni.entrypoints.openai.pictures import partial_steps

PROMPT = "a red circle on a blue background"


def picture(entry) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry.b64_json)))


def test_a_picture_is_the_one_that_the_engine_makes_of_the_seed(client, server):
    answer = client.images.generate(prompt=PROMPT, **SMALL)
    shown = picture(answer.data[0])
    assert (shown.size, shown.format, answer.size, answer.output_format) == ((64, 64), "PNG", "64x64", "png")
    engine = server.omni.engine
    request = engine.validate(PROMPT, OmniDiffusionSamplingParams(height=64, width=64, num_inference_steps=3, seed=1))
    again = client.images.generate(prompt=PROMPT, **SMALL)
    assert again.data[0].b64_json == answer.data[0].b64_json
    assert request.seeds == answer.receipt["seeds"] == [1]
    assert answer.receipt["model"] == server.http_server.state.model_name
    assert answer.timings["num_steps"] == 3


def test_pictures_come_in_number_and_format_as_asked(client):
    answer = client.images.generate(prompt=PROMPT, n=2, output_format="webp", output_compression=50, **SMALL)
    assert [picture(entry).format for entry in answer.data] == ["WEBP", "WEBP"]
    assert answer.data[0].b64_json != answer.data[1].b64_json
    assert answer.receipt["seeds"] == [1, 2]
    assert picture(client.images.generate(prompt=PROMPT, output_format="jpeg", **SMALL).data[0]).format == "JPEG"


def test_a_stream_shows_partial_pictures_and_then_the_same_picture(client):
    body = {"seed": 1, "num_inference_steps": 9}
    whole = client.images.generate(prompt=PROMPT, size="256x256", extra_body=body)
    with client.images.generate(
        prompt=PROMPT, size="256x256", stream=True, partial_images=2, extra_body=body
    ) as stream:
        events = list(stream)
    kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.type for event in events] == kinds
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert events[-1].b64_json == whole.data[0].b64_json
    final = np.asarray(picture(events[-1]), np.float32)
    errors = [np.abs(np.asarray(picture(event), np.float32) - final).mean() for event in events[:2]]
    assert picture(events[0]).size == (256, 256)
    assert errors[1] < errors[0]
    late = np.asarray(picture(events[1]), np.float32)
    assert np.abs(late.mean(axis=(0, 1)) - final.mean(axis=(0, 1))).max() < 50, "a preview has the picture's colours"


def test_pictures_may_be_fetched_from_an_address(client, server):
    answer = client.images.generate(prompt=PROMPT, response_format="url", output_format="webp", **SMALL)
    assert answer.data[0].b64_json is None
    path = answer.data[0].url.removeprefix(server.address)
    assert path.startswith("/files/")
    status, headers, content = server.call("GET", path)
    assert (status, headers["Content-Type"]) == (200, "image/webp")
    assert Image.open(io.BytesIO(content)).size == (64, 64)


def test_a_stream_tells_its_progress_if_asked(server):
    body = {"prompt": PROMPT, "size": "64x64", "num_inference_steps": 40, "seed": 1, "stream": True}
    content = server.call("POST", "/v1/images/generations", body | {"stream_progress": True})[2].decode()
    blocks = [block.split("\n", 1) for block in content.strip().split("\n\n")]
    events = [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]
    assert {name for name, _ in events[:-1]} == {"progress"}
    steps = [told["step"] for _, told in events[:-1]]
    assert steps[0] == 0
    assert steps == sorted(steps)
    assert steps[-1] == 40
    assert any(told.get("preview", "").startswith("data:image/jpeg;base64,") for _, told in events)
    assert events[-1][0] == "image_generation.completed"
    whole = server.call("POST", "/v1/images/generations", body | {"stream": False})[2]
    assert events[-1][1]["b64_json"] == whole["data"][0]["b64_json"]


@pytest.mark.parametrize(
    ("num_steps", "num_previews", "steps"),
    [(9, 2, {3, 6}), (20, 3, {5, 10, 15}), (20, 0, set()), (1, 3, set()), (2, 3, {1}), (4, 1, {2})],
)
def test_partial_pictures_are_evenly_spaced_and_never_of_the_last_step(num_steps, num_previews, steps):
    assert partial_steps(num_steps, num_previews) == steps


def test_fields_of_extra_body_may_stand_in_one_and_twice_is_an_error(server):
    body = {"prompt": PROMPT, "size": "64x64", "extra_body": {"num_inference_steps": 1, "seed": 2}}
    status, _, answer = server.call("POST", "/v1/images/generations", body)
    assert (status, answer["receipt"]["seeds"]) == (200, [2])
    status, _, answer = server.call("POST", "/v1/images/generations", body | {"seed": 3})
    assert (status, answer["error"]["param"]) == (400, "seed")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"size": "33x64"}, "size", "the nearest is 32"),
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"size": "64x64", "extra_body": {"width": 64}}, "size", "exclude each other"),
        ({"extra_body": {"sede": 1}}, "sede", "did you mean 'seed'"),
        ({"extra_body": {"steps": 5}}, "steps", "did you mean 'num_inference_steps'"),
        ({"extra_body": {"num_frames": 5}}, "num_frames", "not a parameter of this model"),
        ({"extra_body": {"seed": -1}}, "seed", "between 0 and"),
        ({"extra_body": {"num_inference_steps": 2.5}}, "num_inference_steps", "valid integer"),
        ({"extra_body": {"extra_args": {"x": 1}}}, "extra_args.x", "no parameter 'x'"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"quality": "high"}, "quality", "'auto'"),
        ({"background": "transparent"}, "background", "'opaque'"),
        ({"style": "vivid"}, "style", "unknown field"),
        ({"output_compression": 50}, "output_compression", "png"),
        ({"partial_images": 2}, "partial_images", "stream"),
        ({"extra_body": {"stream_progress": True}}, "stream_progress", "needs stream=true"),
        ({"prompt": None}, "prompt", "missing"),
    ],
)
def test_bad_input_is_a_400_that_names_the_field(client, fields, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**({"prompt": "a cat"} | fields))
    error = caught.value.body
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert message in error["message"]
    assert error["code"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b'{"prompt": "a cat", "\\ud800": 1}', "\\ud800"),
        (b'{"prompt": "a cat", "extra_body": {"\\ud800": 1}}', "\\ud800"),
        (b'{"prompt": "a cat", "extra_args": {"\\ud800": 1}}', "extra_args.\\ud800"),
    ],
)
def test_text_that_is_no_unicode_is_a_400(server, body, param):
    status, _, answer = server.call("POST", "/v1/images/generations", body)
    assert (status, answer["error"]["param"]) == (400, param)


@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "size", "model", "quality", "x" * 3_000_000])
def test_a_value_or_a_name_as_long_as_a_body_costs_no_time_and_is_not_sent_back(server, field):
    started = time.monotonic()
    status, _, answer = server.call("POST", "/v1/images/generations", {"prompt": "a cat", field: "red " * 1_000_000})
    assert time.monotonic() - started < 2
    assert status in (400, 404)
    assert answer["error"]["param"][:100] == field[:100]
    assert len(str(answer)) < 3000


def test_an_extra_body_within_another_is_not_ignored(server):
    body = {"prompt": "a cat", "extra_body": {"extra_body": {"nonsense": 1}}}
    status, _, answer = server.call("POST", "/v1/images/generations", body)
    assert (status, answer["error"]["param"]) == (400, "extra_body")


def test_a_prompt_that_only_the_tokenizer_finds_too_long_is_a_400_too(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="red " * 600, **SMALL)
    assert caught.value.param == "prompt"
    with pytest.raises(openai.APIError, match="max_sequence_length"):
        list(client.images.generate(prompt="red " * 600, stream=True, **SMALL))


def test_another_model_is_a_404(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a cat", model="dall-e-2")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_editing_with_a_model_that_takes_no_pictures_names_the_picture(client):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=("red.png", file.getvalue(), "image/png"), prompt="a cat")
    assert caught.value.param == "image"
