"""The page at /, as a user meets it: in a browser."""

from __future__ import annotations

import re
import time

import pytest
from PIL import Image

from tests import tiny_flux, tiny_wan
from tests.browser import chromium
from tests.serving import differ_by, running_server
from vllm_omni import AsyncOmni

PROMPT = "a red circle on a blue background"
MADE = "button.view"  # a picture in the gallery


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def open_page(browser):
    """Open the page of a server in a browser that knows nothing yet. Any error in the page fails the test."""
    contexts, errors = [], []

    def open_it(server, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if "Policy" in message.text else None)
        page.goto(server.address)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert errors == []


def generate(page, prompt=PROMPT, **fields):
    page.fill("#prompt", prompt)
    for name, value in ({"width": 64, "height": 64, "num_inference_steps": 2, "seed": 1} | fields).items():
        page.fill(f"#{name}", str(value))
    page.click("text=Generate")


def made(page, number):
    """Wait until the gallery holds so many pictures."""
    end = time.monotonic() + 20
    while (count := page.locator(MADE).count()) != number:
        assert time.monotonic() < end, f"there are {count} pictures, not {number}"
        page.wait_for_timeout(20)


def facts(page):
    return page.locator(".card .facts").first.inner_text()


def src(page, index=0):
    return page.locator(f"{MADE} img").nth(index).get_attribute("src")


def pixels(page, index=0):
    """A picture of the gallery, as PNG in base64."""
    draw = """image => { const c = document.createElement("canvas"); c.width = image.naturalWidth;
        c.height = image.naturalHeight; c.getContext("2d").drawImage(image, 0, 0);
        return c.toDataURL().split(",")[1]; }"""
    image = page.locator(f"{MADE} img").nth(index)
    image.evaluate("image => image.decode()")
    return image.evaluate(draw)


def test_nothing_is_loaded_from_elsewhere_and_no_script_stands_in_the_page(server):
    status, headers, content = server.call("GET", "/")
    policy = headers["Content-Security-Policy"]
    assert status == 200
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page = content.decode()
    assert not re.search(r"<script>|<style|\son\w+=|\sstyle=|https?://", page)
    for name in re.findall(r'(?:href|src)="(ui/[^"]+)"', page):
        assert server.call("GET", f"/{name}")[0] == 200
    assert server.call("GET", "/ui/page.py")[0] == server.call("GET", "/ui/..%2fpage.py")[0] == 404


def test_the_form_asks_what_the_model_takes(server, open_page):
    page = open_page(server)
    page.locator("#size-fields").wait_for()
    assert [page.get_attribute(f"#{name}", "placeholder") for name in ("width", "height", "num_inference_steps")] == [
        *("256", "256", "20")
    ]
    assert page.locator("#negative_prompt").is_visible()
    assert not page.locator("#image-field").is_visible()
    page.click("#more summary")
    assert page.get_by_label("true cfg scale").get_attribute("placeholder") == "4"
    page.select_option("#shape", label="Landscape 4:3")
    assert (page.input_value("#width"), page.input_value("#height")) == ("288", "224")


def test_a_picture_is_made_kept_and_made_again(server, open_page):
    page = open_page(server)
    generate(page, n=2)
    made(page, 2)
    assert "· 2 steps · seed 2 ·" in facts(page)
    page.reload()
    made(page, 2)
    second = pixels(page)
    page.click("text=Reset")
    page.locator("text=Again").first.click()
    assert [page.input_value(f"#{name}") for name in ("prompt", "seed", "n", "width")] == [PROMPT, "2", "", "64"]
    page.keyboard.press("Control+Enter")
    made(page, 3)
    assert differ_by(pixels(page), second) <= 1
    page.locator("text=Variation").first.click()
    made(page, 4)
    assert "seed 2 " not in facts(page)
    assert differ_by(pixels(page), second) > 1
    assert page.locator("#status").inner_text() == f"Finished: {PROMPT}"


def test_progress_and_preview_are_shown_and_a_request_can_be_cancelled(server, open_page):
    page = open_page(server)
    generate(page, num_inference_steps=5000)
    page.locator(".preview").wait_for()
    shown = page.locator(".running .facts").inner_text()
    assert re.fullmatch(r"Step \d+ of 5000 · .+ left", shown), shown
    assert 0 < page.locator(".running progress").evaluate("bar => bar.value") < 1
    live = [request for request in server.omni.live.in_progress if request.num_steps == 5000]
    page.click(".running >> text=Cancel")
    page.locator(".running").wait_for(state="detached")
    server.wait_until(lambda: live[0].state == "aborted")
    assert page.locator("#status").inner_text() == "Cancelled."


def test_a_reload_loses_no_request(server, open_page):
    page = open_page(server)
    for number in range(4):  # the page sends three at a time
        generate(page, f"star {number}", num_inference_steps=5000)
    page.locator(".card.running .facts", has_text="Step").first.wait_for()
    page.on("dialog", lambda dialog: dialog.accept())
    page.reload()
    page.locator(".card.running .facts", has_text="Step").first.wait_for()
    cards = page.locator(".card.running .prompt")
    assert cards.all_inner_texts() == [f"star {number}" for number in (3, 2, 1, 0)]
    for number in range(4):
        page.locator(".card.running", has_text=f"star {number}").locator("text=Cancel").click()
    page.locator("#empty").wait_for()
    page.reload()
    page.locator("#empty").wait_for()
    server.wait_until(lambda: not server.omni.live.in_progress)


def test_the_keyboard_goes_on_from_where_a_card_was(server, open_page):
    page = open_page(server)
    focused = "document.activeElement.querySelector('.facts')?.innerText ?? document.activeElement.id"
    generate(page, n=3)
    made(page, 3)
    page.locator(MADE).first.press("Enter")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    page.locator(".card:nth-child(2) button.view:focus").wait_for()
    page.keyboard.press("Enter")
    page.locator("#viewer >> text=Delete").press("Enter")
    made(page, 2)
    assert "seed 1 " in page.evaluate(focused)
    generate(page, num_inference_steps=5000)
    page.locator(".card.running >> text=Cancel").press("Enter")
    page.locator(".card.running").wait_for(state="detached")
    assert "seed 3 " in page.evaluate(focused)
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#clear").press("Enter")
    made(page, 0)
    assert page.evaluate(focused) == "gallery-title"


def test_the_queue_shows_all_requests_and_ends_them(server, open_page):
    page = open_page(server)
    for number in range(5):
        generate(page, f"circle {number}", num_inference_steps=5000)
    page.locator("text=Waits for the requests before it").first.wait_for()
    page.click("#open-queue")
    row = page.locator("#queue-list li", has_text="circle 0")
    row.locator("progress").wait_for()
    assert row.locator(".facts").inner_text().startswith("yours · image · 64x64 · step ")
    for number in range(5):
        page.locator("#queue-list li", has_text=f"circle {number}").locator("text=Cancel").click()
    page.locator("#queue-empty", has_text="Nothing").wait_for()
    page.keyboard.press("Escape")
    page.locator(".running").first.wait_for(state="detached")


def test_an_error_is_shown_as_the_server_says_it_at_its_field(server, open_page):
    page = open_page(server)
    generate(page, width=33)
    page.locator("#field-error").wait_for()
    assert page.locator("#field-error").inner_text() == "width=33 must be a multiple of 32; the nearest is 32"
    assert page.evaluate("document.activeElement.id") == "width"
    page.fill("#width", "64")
    assert page.locator("#field-error").count() == page.locator(".card").count() == 0
    page.fill("#prompt", " ")
    page.click("text=Generate")
    assert "prompt" in page.locator("#field-error").inner_text()


@pytest.mark.parametrize(
    ("message", "shown"), [("try again in 4 s", "try again in 4 s"), ("full", "full (the server asks to wait 4 s)")]
)
def test_a_refused_request_says_once_how_long_to_wait(server, open_page, message, shown):
    page = open_page(server)
    refusal = {"status": 429, "headers": {"Retry-After": "4"}, "json": {"error": {"message": message}}}
    page.route("**/v1/images/generations", lambda route: route.fulfill(**refusal))
    generate(page)
    page.locator(".card.failed").wait_for()
    assert page.locator(".card .error").inner_text() == shown
    page.unroute("**/v1/images/generations")
    page.click(".card >> text='Try again'")
    made(page, 1)


def test_two_pictures_are_compared_by_keyboard(server, open_page):
    page = open_page(server)
    generate(page, n=2)
    made(page, 2)
    for index in range(2):
        page.locator(".card >> text=Compare").nth(index).press("Enter")
    page.locator("#compare-open").press("Enter")
    split = "() => getComputedStyle(document.querySelector('.compare')).getPropertyValue('--split')"
    assert page.evaluate(split) == "50%"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(split) == "50.5%"
    assert page.locator("#differences tr > *").all_inner_texts() == ["Seed", "2", "1"]
    page.keyboard.press("Escape")
    page.locator(MADE).first.press("Enter")
    assert page.locator("#viewer dl").inner_text().startswith(f"Prompt\n{PROMPT}\nSeed\n2")
    page.keyboard.press("ArrowRight")
    assert "Seed\n1" in page.locator("#viewer dl").inner_text()
    page.click("#viewer >> text=Delete")
    made(page, 1)
    page.reload()
    made(page, 1)


def test_a_long_prompt_leaves_the_rest_in_sight(server, open_page):
    page = open_page(server, viewport={"width": 375, "height": 812})
    generate(page, "a small orange cross on a white background " * 40, n=2)
    made(page, 2)
    page.locator(MADE).first.click()
    assert page.locator("#viewer >> text=Download").bounding_box()["y"] < 812
    page.keyboard.press("Escape")
    for index in range(2):
        page.locator(".card >> text=Compare").nth(index).click()
    overflowing = """[...document.querySelectorAll(".compare-bar button, .bar *")]
        .filter(e => e.scrollWidth > e.clientWidth).map(e => e.outerHTML)"""
    assert page.evaluate(overflowing) == []
    grounds = page.locator(".card [aria-pressed=true]").evaluate_all(
        "b => b.map(b => getComputedStyle(b).backgroundColor)"
    )
    assert len(grounds) == 2
    assert len(set(grounds)) == 1  # also the one under the pointer
    page.click("#compare-open")
    box = page.locator(".compare").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + 20)
    assert page.input_value("#split") == "25"


def test_it_fits_a_phone_and_has_light_and_dark_colours(server, open_page):
    page = open_page(server, viewport={"width": 390, "height": 844}, color_scheme="dark")
    generate(page)
    made(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.click("#theme")
    assert page.locator("#theme").inner_text() == "Light"
    light = page.evaluate(ground)
    assert light != dark
    page.reload()
    assert page.evaluate(ground) == light


def test_every_field_and_button_has_a_name(server, open_page):
    page = open_page(server)
    generate(page)
    made(page, 1)
    unnamed = """() => [...document.querySelectorAll("input, select, textarea, button, progress")].filter(e =>
        !e.ariaLabel && !e.labels?.length && !e.textContent.trim() && !e.querySelector("img[alt]"))
        .map(e => e.outerHTML)"""
    assert page.evaluate(unnamed) == []


def test_a_server_with_a_key_is_asked_for_it(shipped_omni, open_page):
    with running_server(shipped_omni, api_key="secret") as guarded:
        page = open_page(guarded)
        page.locator("#key").wait_for()
        page.keyboard.press("Escape")
        page.fill("#prompt", PROMPT)
        page.keyboard.press("Control+Enter")
        assert "the key is missing or wrong" in page.locator("#no-server").inner_text()
        page.click("#open-key")
        for key in ("wrong", "secret"):
            page.locator("#key").wait_for()
            page.fill("#key-text", key)
            page.keyboard.press("Enter")
        page.locator("#key").wait_for(state="hidden")
        generate(page)
        made(page, 1)
        assert page.evaluate("localStorage.getItem('api-key')") is None
        page.evaluate("sessionStorage.setItem('api-key', 'of yesterday')")
        generate(page)
        page.locator("#key").wait_for()
        page.fill("#key-text", "secret")
        page.keyboard.press("Enter")
        made(page, 2)  # what was refused is sent again


def test_a_server_that_is_gone_is_said_to_be_gone(shipped_omni, open_page):
    with running_server(shipped_omni) as leaving:
        page = open_page(leaving)
        page.locator("#size-fields").wait_for()
        generate(page, num_inference_steps=5000)
        page.locator(".card.running .facts", has_text="Step").wait_for()
        leaving.http_server.force_exit = True
    page.locator(".failed .error", has_text="The connection to the server broke off").wait_for()
    page.click("text=Dismiss")
    generate(page)
    assert "cannot be reached" in page.locator(".failed .error").inner_text()
    page.click("#open-queue")
    page.locator("#queue-error", has_text="cannot be reached").wait_for()
    assert not page.locator("#queue-empty").is_visible()


def test_a_picture_is_edited_from_the_gallery(open_page, tmp_path):
    with AsyncOmni(str(tiny_flux.flux_kontext(tmp_path / "model"))) as omni, running_server(omni) as server:
        page = open_page(server)
        page.locator("#image-field").wait_for()
        generate(page)
        assert "starts from a picture" in page.locator("#field-error").inner_text()
        Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
        page.set_input_files("#image", tmp_path / "red.png")
        assert page.locator("#image-list li").count() == 1
        page.click("text=Generate")
        made(page, 1)
        page.click("#image-list button")
        assert page.locator("#image-list li").count() == 0
        page.locator("text=Edit this").click()
        assert page.locator("#image-list li").count() == 1
        page.click("text=Generate")
        made(page, 2)
        assert pixels(page, 0) != pixels(page, 1)


def test_a_video_is_a_job_that_the_page_finds_again(open_page, tmp_path):
    with AsyncOmni(str(tiny_wan.wan_t2v(tmp_path / "model"))) as omni, running_server(omni) as server:
        page = open_page(server)
        page.locator("#size-fields").wait_for()
        assert not page.locator("#n").is_visible()
        page.click("#more summary")
        page.get_by_label("num frames").fill("5")
        small = {"width": 48, "height": 32}
        for name, value in small.items():
            page.fill(f"#{name}", str(value))
        page.fill("#prompt", PROMPT)
        page.fill("#num_inference_steps", "2")
        page.click("text=Generate")
        made(page, 1)
        assert re.match(r"48 . 32 · 5 frames at 16/s · 2 steps · seed \d+ · ", facts(page))
        video = page.locator(f"{MADE} video")
        page.wait_for_timeout(100)
        assert video.evaluate("video => [video.error, video.videoWidth]") == [None, 48]
        page.fill("#num_inference_steps", "2000")
        page.click("text=Generate")
        page.locator(".running .facts", has_text="Step").wait_for()
        page.reload()
        page.locator(".running .facts", has_text="Step").wait_for()
        page.click(".running >> text=Cancel")
        page.locator(".running").wait_for(state="detached")
        page.fill("#num_inference_steps", "200")
        page.click("text=Generate")
        page.locator(".running .facts", has_text="Step").wait_for()
        other = page.context.new_page()
        other.goto(server.address)
        other.locator(".running").wait_for()
        made(page, 2)
        made(other, 2)
        page.reload()
        made(page, 2)  # the gallery keeps it once, though two tabs have followed it
        page.wait_for_timeout(100)
        assert page.locator(".card").count() == 2
