"""Chat with pictures in and out."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import threading

import openai
import pytest
from PIL import Image
from pydantic import ValidationError

from tests import tiny_flux
from tests.serving import differ_by, running_server
from vllm_omni import AsyncOmni
from vllm_omni.entrypoints.openai.chat import ChatFields

EXTRA = {"size": "64x64", "num_inference_steps": 2, "seed": 1}


def opened(part) -> Image.Image:
    header, _, content = part["image_url"]["url"].partition(",")
    assert header == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def messages(text, *urls):
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *pictures]}]


def test_a_message_is_answered_by_pictures(client, server):
    answer = client.chat.completions.create(
        model=server.http_server.state.model_name,
        messages=[{"role": "user", "content": "a red circle"}],
        extra_body=EXTRA | {"num_outputs_per_prompt": 2},
    )
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    assert [opened(part).size for part in choice.message.content] == [(64, 64), (64, 64)]
    assert answer.receipt["seeds"] == [1, 2]
    again = client.images.generate(prompt="a red circle", extra_body=EXTRA)
    made = choice.message.content[0]["image_url"]["url"].partition(",")[2]
    assert differ_by(made, again.data[0].b64_json) <= 1


def test_a_chat_streams_and_ends_as_openais_do(client, server):
    chunks = list(
        client.chat.completions.create(model=None, messages=messages("a red circle"), stream=True, extra_body=EXTRA)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert opened(chunks[1].choices[0].delta.content[0]).size == (64, 64)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].receipt["seeds"] == [1]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    for stream in (True, False):
        long = {"model": None, "messages": messages("red " * 600), "stream": stream, "extra_body": EXTRA}
        with pytest.raises(openai.APIError, match="max_sequence_length") as caught:
            list(client.chat.completions.create(**long))
        assert caught.value.param == "messages"


def test_pictures_of_a_message_are_edited(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    folder = tiny_flux.flux_kontext(tmp_path / "model")
    with AsyncOmni(str(folder)) as omni, running_server(omni) as server, server.client() as client:
        answer = client.chat.completions.create(
            model=None, messages=messages("make it blue", url), extra_body=EXTRA | {"num_inference_steps": 1}
        )
        assert opened(answer.choices[0].message.content[0]).size == (64, 64)
        with pytest.raises(openai.BadRequestError, match="send it as image to POST /v1/images/edits") as caught:
            client.images.generate(prompt="make it blue")
        assert caught.value.param == "image"
        with pytest.raises(openai.BadRequestError, match="send it as a part of type image_url"):
            client.chat.completions.create(model=None, messages=messages("make it blue"))
        edited = client.images.edit(
            image=("red.png", file.getvalue(), "image/png"),
            prompt="make it blue",
            size="64x64",
            extra_body={"num_inference_steps": 1, "seed": 1},
        )
        assert answer.choices[0].message.content[0]["image_url"]["url"].endswith(edited.data[0].b64_json)
        events = list(
            client.images.edit(
                image=[("red.png", file.getvalue(), "image/png")],
                prompt="make it blue",
                size="64x64",
                stream=True,
                extra_body={"num_inference_steps": 1, "seed": 1},
            )
        )
        assert [event.type for event in events] == ["image_edit.completed"]
        assert events[0].b64_json == edited.data[0].b64_json
        for content, text in ((b"no picture", "no picture"), (file.getvalue()[:60], "all bytes of the file")):
            with pytest.raises(openai.BadRequestError, match=text) as caught:
                client.images.edit(image=("red.png", content, "image/png"), prompt="x", size="64x64")
            assert caught.value.param == "image"
        bomb = io.BytesIO()
        Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
        assert len(bomb.getvalue()) < 2**20
        with pytest.raises(openai.BadRequestError, match="pixels") as caught:
            client.images.edit(image=("bomb.png", bomb.getvalue(), "image/png"), prompt="x", size="64x64")
        assert caught.value.param == "image"
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt="x", size="64x64")
        assert caught.value.param == "image"
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(image=("red.png", file.getvalue()), mask=("m.png", file.getvalue()), prompt="x")
        assert caught.value.param == "mask"


def test_a_client_that_leaves_ends_the_fetching_of_its_pictures(server, monkeypatch):
    begun, ended = threading.Event(), threading.Event()

    async def fetch_for_ever(urls, param):
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    monkeypatch.setattr(server.http_server.state, "check_pictures", lambda *_: None)
    monkeypatch.setattr(server.http_server.state.media, "fetch", fetch_for_ever)
    host, port = server.address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    body = json.dumps({"messages": messages("a", "https://pictures.test/a.png")})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    assert begun.wait(timeout=60)
    connection.close()
    assert ended.wait(timeout=60)


def test_the_format_of_pictures_means_nothing_to_a_model_of_videos(video_server):
    fields = {"messages": messages("a cat"), "output_format": "webp"}
    status, _, answer = video_server.call("POST", "/v1/chat/completions", fields)
    assert (status, answer["error"]["param"]) == (400, "output_format")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": messages("a") * 2}, "messages"),
        ({"messages": [{"role": "system", "content": "be kind"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
        ({"messages": messages("a", "https://example.com/a.png")}, "messages"),
        ({"messages": messages("a", "data:image/png;base64,AAAA")}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content.0.text"),
        ({"messages": messages("a", 5)}, "messages.0.content.1.image_url.url"),
        ({"messages": messages("a", *["data:image/png;base64,AAAA"] * 64)}, "messages.0.content"),
        ({"messages": messages("a"), "modalities": ["image"] * 9}, "modalities"),
        ({"messages": messages("a"), "sigmas": [0.5] * 10_001}, "sigmas"),
        ({"messages": messages("a"), "temperature": 1}, "temperature"),
        ({"messages": messages("a"), "n": 1, "num_outputs_per_prompt": 2}, "n"),
        ({"messages": messages("a"), "modalities": ["video"]}, "modalities"),
        ({"messages": messages("a"), "size": "33x32"}, "size"),
    ],
)
def test_bad_input_names_the_field(server, fields, param):
    status, _, answer = server.call("POST", "/v1/chat/completions", fields)
    assert (status, answer["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"content": ["x"] * 64}, "must be an object with the type 'text' or 'image_url'"),
        ({"content": ["x"] * 65}, "messages.0.content holds 65 entries; at most 64 are taken"),
        ({"modalities": ["x"] * 8}, "should be 'image' or 'video'"),
        ({"modalities": ["x"] * 9}, "modalities holds 9 entries; at most 8 are taken"),
        ({"timesteps": ["x"] * 10_000}, "should be a valid number"),
        ({"timesteps": ["x"] * 10_001}, "timesteps holds 10001 entries; at most 10000 are taken"),
    ],
)
def test_a_list_of_wrong_entries_makes_one_error(fields, message):
    given = {"content": "a"} | fields
    with pytest.raises(ValidationError, match=message) as caught:
        ChatFields(messages=[{"role": "user", "content": given.pop("content")}], **given)
    assert caught.value.error_count() == 1


def test_a_conversation_is_refused_with_the_reason(server):
    answer = server.call("POST", "/v1/chat/completions", {"messages": messages("a") * 3})[2]
    assert answer["error"]["message"].startswith("messages holds 3 messages; a diffusion model remembers nothing")
