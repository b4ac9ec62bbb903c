"""The coloured-shapes scenes, their captions, and the judge that reads pictures back."""

from __future__ import annotations

import dataclasses
import random
import re
from itertools import combinations

import numpy as np
import pytest

from tools.shapes import scenes
from tools.shapes.judge import judge, read

Thing, Scene = scenes.Thing, scenes.Scene


def two_objects() -> np.ndarray:
    """A large red circle left of a small blue square on white."""
    left = Thing("red", "circle", "large", 70, 128, 96)
    right = Thing("blue", "square", "small", 190, 120, 40)
    return scenes.render(Scene((left, right), ("white",)))


RIGHT = "a large red circle left of a small blue square on a white background"


def test_judge_reads_back_drawn_scenes():
    rng = random.Random(1)
    right = 0
    for i in range(300):
        scene = scenes.sample_scene(rng, want_held_out=i % 2 == 0)
        right += judge(scenes.render(scene), scenes.caption(scene, rng)).right
    assert right >= 297


def test_judge_forgives_noise_and_blur():
    rng = np.random.default_rng(0)
    picture = two_objects().astype(float)
    blurred = (picture + np.roll(picture, 1, 0) + np.roll(picture, 1, 1) + np.roll(picture, (1, 1), (0, 1))) / 4
    noisy = np.clip(blurred + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
    assert judge(noisy, RIGHT).right


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (RIGHT, ""),
        ("a small blue square right of a large red circle on a white background", ""),
        ("a red circle and a blue square on a white background", ""),
        ("a red circle left of a blue square", ""),
        (RIGHT.replace("red", "green"), "colour"),
        (RIGHT.replace("circle", "star"), "shape"),
        (RIGHT.replace("large", "small"), "size"),
        (RIGHT.replace("left of", "right of"), "relation"),
        (RIGHT.replace("left of", "above"), "relation"),
        (RIGHT.replace("white", "yellow"), "background"),
        (RIGHT.replace("a white background", "a white to yellow gradient background"), "background"),
        ("a large red circle on a white background", "count"),
        ("a red circle, a blue square and a green star on a white background", "count"),
    ],
)
def test_judge_verdicts(caption, reason):
    verdict = judge(two_objects(), caption)
    assert verdict.right == (not reason)
    assert {r.split(":")[0] for r in verdict.reasons} == ({reason} if reason else set())


def test_judge_rejects_swapped_colours_and_wrong_place():
    assert not judge(two_objects(), "a blue circle left of a red square on a white background").right
    picture = scenes.render(Scene((Thing("red", "star", "", 66, 128, 64),), ("black",)))
    assert judge(picture, "a red star on the left on a black background").right
    assert judge(picture, "a red star on the right on a black background").reasons == ("position: not on the right",)


def test_judge_rejects_a_blob_of_two_colours():
    picture = scenes.render(Scene((Thing("red", "square", "", 128, 128, 64),), ("white",)))
    picture[96:160, 128:160] = scenes.COLOURS["blue"]
    assert not judge(picture, "a red square on a white background").right


@pytest.mark.parametrize("background", [("blue",), ("yellow", "white"), ("black", "purple")])
def test_gradient_backgrounds_are_read(background):
    shown = scenes.free_colours(background)[0]
    picture = scenes.render(Scene((Thing(shown, "cross", "", 150, 90, 60),), background))
    found, seen = read(picture)
    assert seen == background
    assert [(f.colour, f.shape) for f in found] == [(shown, "cross")]


def test_captions_round_trip():
    rng = random.Random(2)
    for _ in range(500):
        scene = scenes.sample_scene(rng)
        text = scenes.caption(scene, rng)
        expected = scenes.parse_caption(text)
        words = sorted((t.size, t.colour, t.shape) for t in scene.things)
        assert sorted((t.size, t.colour, t.shape) for t in expected.things) == words
        assert expected.position == scene.position
        assert expected.background in (scene.background, ())
        drawn = {(t.colour, t.shape): t for t in scene.things}
        for i, word, j in expected.relations:
            a, b = (drawn[expected.things[k].colour, expected.things[k].shape] for k in (i, j))
            assert scenes.relation_between(a, b) == word
        assert re.fullmatch(r"[a-z, ]+", text)


@pytest.mark.parametrize(
    "text", ["", "a red", "a red circle beside a blue square", "a pink circle", "a red circle on a mountain"]
)
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="not a caption"):
        scenes.parse_caption(text)


def test_held_out_combinations_never_come_up_in_training():
    rng = random.Random(3)
    for _ in range(3000):
        scene = scenes.sample_scene(rng)
        assert not scenes.held_out(scene.things, scene.background, scene.position)
        for a, b in combinations(scene.things, 2):
            assert not scenes.pair_held_out((a.colour, a.shape), (b.colour, b.shape))
            assert not scenes.pair_held_out((b.colour, b.shape), (a.colour, a.shape))
    for count in (1, 2, 3):
        scene = scenes.sample_scene(rng, count, want_held_out=True)
        assert scenes.held_out(scene.things, scene.background, scene.position)


def test_objects_stand_apart_and_inside():
    rng = random.Random(4)
    for _ in range(500):
        scene = scenes.sample_scene(rng)
        for t in scene.things:
            low, high = scenes.BORDER + t.side / 2, scenes.PICTURE_SIZE - scenes.BORDER - t.side / 2
            assert low <= t.x <= high
            assert low <= t.y <= high
        for a, b in combinations(scene.things, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.side + b.side) / 2 + scenes.GAP


def test_a_seed_gives_the_same_scenes():
    first, second = ([scenes.sample_scene(rng) for _ in range(20)] for rng in (random.Random(7), random.Random(7)))
    assert first == second
    moved = dataclasses.replace(first[0].things[0], x=first[0].things[0].x + 1)
    assert moved != first[0].things[0]


def test_fast_forward_passes_equal_the_library_ones():
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from tools.shapes import models
    from tools.shapes.tokenizer import PREFIX, PREFIX_TOKENS, SUFFIX, build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    encoder = models.build_text_encoder(tokenizer).eval()
    transformer = models.build_transformer(layers=2).eval()
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    captions = [PREFIX + c + SUFFIX for c in ("a red circle", "a red circle left of a blue star on a white background")]
    batch = tokenizer(captions, padding=True, return_tensors="pt")
    mask = batch.attention_mask[:, PREFIX_TOKENS:]
    length = mask.shape[1]
    noise, sigma = torch.randn(2, 64, 64), torch.tensor([0.3, 0.9])
    additive = torch.zeros(2, 1, 1, length + 64)
    additive[:, 0, 0, :length] = (1 - mask) * -1e9
    with torch.no_grad():
        full = encoder(**batch, output_hidden_states=True).hidden_states[-1][:, PREFIX_TOKENS:]
        prefix, ids = batch.input_ids[0, :PREFIX_TOKENS], batch.input_ids[:, PREFIX_TOKENS:]
        fast = models.encode_text(encoder, prefix, ids, *models.text_tables(encoder, PREFIX_TOKENS + length))
        torch.testing.assert_close(fast[mask.bool()], full[mask.bool()], atol=1e-4, rtol=1e-4)
        wanted = transformer(
            hidden_states=noise,
            timestep=sigma,
            encoder_hidden_states=full,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, 8, 8)]] * 2,
            return_dict=False,
        )[0]
        tables = models.image_tables(transformer, length)
        got = models.predict(transformer, noise, full, additive, sigma, *tables)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_tables_draw_what_the_scenes_draw():
    torch = pytest.importorskip("torch")
    from tools.shapes import table

    rng = random.Random(5)
    drawn = [scenes.sample_scene(rng) for _ in range(24)]
    columns = [torch.from_numpy(column) for column in table.tabulate(drawn)]
    whole = table.draw(*columns)
    shown = ((whole + 1) * 127.5).round().permute(0, 2, 3, 1).byte().numpy()
    assert np.array_equal(shown, np.stack([scenes.render(s) for s in drawn]))
    corners = torch.randint(0, 128, (24, 2))
    crops = table.draw(*columns, corners, 128)
    for picture, crop, (x, y) in zip(whole, crops, corners.tolist(), strict=True):
        assert torch.equal(crop, picture[:, y : y + 128, x : x + 128])


def test_a_table_does_not_depend_on_the_number_of_processes():
    torch = pytest.importorskip("torch")
    from tools.shapes import table

    alone, shared = (table.sample_table(table.CHUNK + 10, 3, 1, num_workers=n) for n in (1, 2))
    assert torch.equal(alone.things, shared.things)
    assert torch.equal(alone.caption_ids, shared.caption_ids)
    assert int(alone.caption_lengths.max()) <= table.CAPTION_TOKENS


def test_captions_become_the_ids_of_the_tokenizer():
    pytest.importorskip("transformers")
    from tools.shapes import table
    from tools.shapes.tokenizer import PREFIX, PREFIX_TOKENS, SUFFIX, build_tokenizer

    rng, tokenizer = random.Random(6), build_tokenizer()
    for _ in range(100):
        text = scenes.caption(scenes.sample_scene(rng), rng)
        assert table.caption_ids(text) == tokenizer(PREFIX + text + SUFFIX).input_ids[PREFIX_TOKENS:]


def test_a_layout_says_which_share_of_a_cell_lies_in_a_box():
    torch = pytest.importorskip("torch")
    from tools.shapes import table

    star = Scene((Thing("red", "star", "", 128, 48, 64),), ("white",))
    (labels,) = table.layout(torch.from_numpy(table.tabulate([star])[1]), 8)
    colour, shape = list(scenes.COLOURS).index("red"), len(scenes.COLOURS) + scenes.SHAPES.index("star")
    expected = torch.zeros(8, 8)
    expected[:3, 3:5] = torch.tensor([0.5, 1.0, 0.5])[:, None]  # 96 to 160 across, 16 to 80 down, cells of 32
    assert torch.equal(labels[colour], expected)
    assert torch.equal(labels[shape], expected)
    assert labels.sum() == 2 * expected.sum()
