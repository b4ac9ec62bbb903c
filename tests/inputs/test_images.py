"""Pictures of a prompt: what is taken, what it becomes, and what is refused."""

from __future__ import annotations

import base64
import builtins
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs import images
from vllm_omni.inputs.images import MAX_PIXELS, load_images, prompt_images

COLOURS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
PICTURE = Image.fromarray(COLOURS)


def encoded(picture, file_format="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def data_url(data, kind="png"):
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def png(width, height, bits, colour_type):
    """A black PNG of a form that Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    samples = {0: 1, 2: 3, 6: 4}[colour_type]
    rows = (b"\0" + bytes(width * samples * bits // 8)) * height
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def load(value, **options):
    return load_images(value, param="image", **options)


def refusal(value, **options):
    with pytest.raises(InvalidRequestError) as caught:
        load(value, **options)
    assert caught.value.param == "image"
    return str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        PICTURE,
        COLOURS,
        COLOURS / 255,
        encoded(PICTURE),
        bytearray(encoded(PICTURE)),
        encoded(PICTURE, "BMP"),
        encoded(PICTURE, "WEBP", lossless=True),
        data_url(encoded(PICTURE)),
        data_url(encoded(PICTURE)).replace("data:image/png", "DATA:IMAGE/PNG"),
    ],
    ids=["PIL", "uint8", "floats", "bytes", "bytearray", "BMP", "WebP", "data URL", "upper case"],
)
def test_every_form_gives_the_same_picture(value):
    (picture,) = load(value)
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), COLOURS)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA", "YCbCr", "HSV"])
def test_every_8_bit_mode_is_converted(mode):
    (picture,) = load(PICTURE.convert(mode))
    assert picture.mode == "RGB"
    assert picture.size == PICTURE.size


def test_a_grey_array_becomes_a_grey_picture():
    (picture,) = load(COLOURS[:, :, 0])
    assert np.array_equal(np.asarray(picture), np.repeat(COLOURS[:, :, :1], 3, axis=2))


def test_transparency_is_laid_on_white():
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    half.putpixel((1, 1), (0, 0, 255, 255))
    (picture,) = load(half)
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((1, 1)) == (0, 0, 255)


def test_a_transparent_colour_of_a_palette_is_laid_on_white():
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 1), 1)
    (picture,) = load(encoded(palette, "PNG", transparency=0))
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((1, 1)) == (0, 255, 0)


def test_a_model_of_rgba_pictures_gets_transparency_as_it_is():
    (picture,) = load(Image.new("RGBA", (2, 2), (255, 0, 0, 7)), mode="RGBA")
    assert picture.getpixel((0, 0)) == (255, 0, 0, 7)
    (opaque,) = load(PICTURE, mode="RGBA")
    assert opaque.getpixel((0, 0))[3] == 255


def test_a_photograph_is_turned_as_its_camera_was():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its right side
    (picture,) = load(encoded(PICTURE, "PNG", exif=exif))
    assert picture.size == (4, 6)
    assert np.array_equal(np.asarray(picture), np.rot90(COLOURS, -1))


def test_a_list_keeps_its_order():
    other = Image.new("RGB", (3, 3), "red")
    assert [picture.size for picture in load([PICTURE, encoded(other)], max_images=2)] == [(6, 4), (3, 3)]


def test_the_number_of_pictures_is_limited():
    assert "3 pictures; this model takes 1 to 2 pictures" in refusal([PICTURE] * 3, max_images=2)
    assert "2 pictures; this model takes one picture" in refusal([PICTURE] * 2)
    assert "0 pictures" in refusal([])


@pytest.mark.parametrize(
    "value", ["/etc/passwd", "picture.png", "file:///etc/passwd", "https://example.org/a.png", "", "data:text/plain,a"]
)
def test_a_string_is_never_opened_or_fetched(monkeypatch, value):
    def forbidden(*arguments, **_):
        raise AssertionError(f"opened {arguments}")

    monkeypatch.setattr(builtins, "open", forbidden)
    monkeypatch.setattr(io, "open", forbidden)
    assert "never opened" in refusal(value)


def test_broken_bytes_are_refused():
    for value in (b"", b"GIF89a and nothing else"):
        assert f"image holds {len(value)} bytes that are no picture" in refusal(value)
        assert "PNG, JPEG or WebP" in refusal(value)
        assert "object at" not in refusal(value)
    assert "cannot be decoded" in refusal(encoded(PICTURE.resize((200, 200)))[:-200])
    assert "cannot be decoded" in refusal(Image.open(io.BytesIO(encoded(PICTURE.resize((200, 200)))[:-200])))
    assert "broken base64" in refusal("data:image/png;base64,@@@")
    assert "no picture" in refusal(data_url(b"nothing"))


@pytest.mark.parametrize("side", [30_000, 10_000], ids=["a bomb to Pillow", "suspicious to Pillow"])
def test_a_picture_that_unpacks_to_gigabytes_is_refused_before_that(side):
    huge = Image.new("1", (side, side))
    assert side * side > MAX_PIXELS
    for value in (huge, encoded(huge)):
        assert f"{MAX_PIXELS:,}" in refusal(value)
        assert "scale it down" in refusal(value)


def test_a_file_of_a_rare_format_is_no_picture_and_no_program_is_run_for_it(monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("a program was run"))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(InvalidRequestError, match="no picture"):
        load_images(postscript, param="image")
    for rare in ("PCX", "JPEG2000", "ICNS"):
        file = io.BytesIO()
        Image.new("RGB", (64, 64)).save(file, rare)
        with pytest.raises(InvalidRequestError, match="no picture"):
            load_images(file.getvalue(), param="image")


def test_pictures_that_are_too_much_together_are_refused_before_that(monkeypatch):
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    monkeypatch.setattr(images, "MAX_PIXELS", 3 * 64 * 64)
    assert len(load_images([file.getvalue()] * 3, param="image", max_images=8)) == 3
    with pytest.raises(InvalidRequestError, match="beside those that came before it"):
        load_images([file.getvalue()] * 4, param="image", max_images=8)


def test_an_animation_is_refused():
    data = encoded(PICTURE, "GIF", save_all=True, append_images=[PICTURE.transpose(Image.Transpose.FLIP_TOP_BOTTOM)])
    assert "animated, with 2 frames" in refusal(data)
    assert "animated, with 2 frames" in refusal(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(
    "value",
    [
        COLOURS.astype(np.uint16),
        COLOURS[:, :, 0].astype(np.uint16),
        Image.fromarray(COLOURS[:, :, 0].astype(np.uint16)),
        Image.fromarray(COLOURS[:, :, 0].astype(np.int32)),
        Image.fromarray(COLOURS[:, :, 0].astype(np.float32)),
        png(4, 4, 16, 0),
        png(4, 4, 16, 2),
        png(4, 4, 16, 6),
        Image.open(io.BytesIO(png(4, 4, 16, 2))),
    ],
    ids=["array", "grey array", "I;16", "I", "F", "grey file", "RGB file", "RGBA file", "PIL of a file"],
)
def test_more_than_8_bits_are_refused(value):
    assert "bit" in refusal(value) or "uint8" in refusal(value)


def test_arrays_of_other_shapes_or_values_are_refused():
    assert "shape [4, 6, 2]" in refusal(COLOURS[:, :, :2])
    assert "shape [1, 4, 6, 3]" in refusal(COLOURS[None])
    assert "shape [0, 6, 3]" in refusal(COLOURS[:0])
    assert "outside [0, 1]" in refusal(COLOURS.astype(np.float32))
    assert "outside [0, 1]" in refusal(np.full((4, 4), np.nan))


def test_anything_else_is_refused():
    assert "is a dict" in refusal({"url": "a.png"})
    assert "is a NoneType" in refusal([None])


def test_a_prompt_without_a_picture_is_refused():
    for prompt in ({"prompt": "a"}, {"prompt": "a", "multi_modal_data": {}}):
        with pytest.raises(InvalidRequestError, match="multi_modal_data") as caught:
            prompt_images(prompt)
        assert caught.value.param == "image"


def test_media_that_the_model_does_not_take_are_refused():
    prompt = {"prompt": "a", "multi_modal_data": {"image": PICTURE, "audio": b""}}
    with pytest.raises(InvalidRequestError, match="'audio'") as caught:
        prompt_images(prompt)
    assert caught.value.param == "multi_modal_data"
