"""Forms that browsers do not send."""

from __future__ import annotations

import io

import pytest
from PIL import Image

EDITS, VIDEOS = "/v1/images/edits", "/v1/videos"
REFERENCE = "input_reference"
ADDRESS = f"{REFERENCE}[image_url]"


@pytest.fixture(scope="module")
def png():
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return file.getvalue()


def send(server, path, *parts, content_type="multipart/form-data; boundary=XX"):
    """Each part is a name and a text, or bytes of a file. Returns the status and the error."""
    body = b""
    for name, value in parts:
        file = '; filename="a.png"' if isinstance(value, bytes) else ""
        content = value if isinstance(value, bytes) else value.encode()
        body += f'--XX\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"
    status, _, answer = server.call("POST", path, body + b"--XX--\r\n", {"Content-Type": content_type})
    return status, answer.get("error")


@pytest.mark.parametrize(
    ("content_type", "message"),
    [
        ("application/json", "must be a form"),
        ("application/x-www-form-urlencoded", "must be a form"),
        ("multipart/form-data", "Missing boundary"),
        ("multipart/form-data; boundary=YY", "cannot be read"),
        ("multipart/form-data; boundary=XX; charset=punycode", "utf-8"),
        ("multipart/form-data; boundary=XX; charset=undefined", "utf-8"),
        ("multipart/form-data; boundary=XX; charset=unicode_escape", "utf-8"),
    ],
)
def test_a_body_that_is_no_form_is_a_400_that_says_why(server, png, content_type, message):
    parts = ("prompt", "a cat"), ("\\ud800", "1"), ("image", png)
    status, error = send(server, EDITS, *parts, content_type=content_type)
    assert (status, error["param"]) == (400, "body")
    assert message in error["message"]


def test_more_files_than_are_taken_are_refused_as_files(server, png):
    status, error = send(server, EDITS, ("prompt", "a cat"), *[("image", png)] * 17)
    assert (status, error["param"]) == (400, "body")
    assert "Too many files" in error["message"]


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([("image", "text")], "image"),
        ([("image[]", "text")], "image"),
        ([("image", b"file"), ("mask", "text")], "mask"),
        ([("image", b"file"), ("mask", b"file"), ("mask", b"file")], "mask"),
        ([("image", b"file"), ("user", b"file")], "user"),
        ([("image", b"file"), ("prompt", "a dog")], "prompt"),
        ([("image", b"file"), ("extra_body", '{"extra_body": {}}')], "extra_body"),
        ([], "image"),
    ],
)
def test_files_and_texts_in_each_others_place_name_the_field(server, parts, param):
    status, error = send(server, EDITS, ("prompt", "a cat"), *parts)
    assert (status, error["param"]) == (400, param)


@pytest.mark.parametrize("path", [VIDEOS, f"{VIDEOS}/sync"])
@pytest.mark.parametrize(
    "references",
    [
        [(REFERENCE, b"file"), (REFERENCE, b"file")],
        [(REFERENCE, b"file"), (ADDRESS, "data:image/png;base64,AAAA")],
        [(ADDRESS, "data:image/png;base64,AAAA")] * 2,
        [(REFERENCE, b"file"), (REFERENCE, '{"image_url": "data:image/png;base64,AAAA"}')],
    ],
)
def test_a_video_starts_from_one_picture_in_one_form(video_server, references, path):
    status, error = send(video_server, path, ("prompt", "a cat"), *references)
    assert (status, error["param"]) == (400, REFERENCE)
    assert "twice" in error["message"]


def test_a_form_is_one_however_its_type_is_written(video_server):
    content_type = 'Multipart/Form-Data; boundary="XX"; charset=UTF-8'
    status, error = send(video_server, VIDEOS, ("prompt", "a cat"), ("size", "50x32"), content_type=content_type)
    assert (status, error["param"]) == (400, "size")
