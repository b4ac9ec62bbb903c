"""The instructions that change coloured shapes, the judge of their results, and the fast forms used in training."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from tools.shapes import models as base
from tools.shapes import scenes
from tools.shapes.table import draw, tabulate
from tools.shapes_edit import autoencoder, models, resize
from tools.shapes_edit.edits import VERBS, held_out, named, parse_instruction, sample_example
from tools.shapes_edit.judge import judge_edit
from tools.shapes_edit.table import INSTRUCTION_TOKENS, sample_table
from tools.shapes_edit.tokenizer import AFTER_PICTURE, BEFORE_PICTURE, PREFIX, PREFIX_TOKENS, SUFFIX, build_tokenizer

Thing, Scene = scenes.Thing, scenes.Scene
SOURCE = Scene(
    (Thing("red", "circle", "large", 70, 70, 96), Thing("blue", "square", "small", 190, 190, 40)), ("white",)
)


def shown(scene: Scene) -> Image.Image:
    return Image.fromarray(scenes.render(scene))


def changed(index: int, **fields: object) -> Scene:
    """The source with one object changed."""
    things = list(SOURCE.things)
    things[index] = dataclasses.replace(things[index], **fields)
    return dataclasses.replace(SOURCE, things=tuple(things))


@pytest.mark.parametrize("verb", VERBS)
def test_a_sampled_target_is_right_and_its_source_is_not(verb):
    rng = random.Random(1)
    for i in range(40):
        example = sample_example(rng, verb, want_held_out=i % 2 == 0)
        verdict = judge_edit(shown(example.target), example.source, example.text)
        assert verdict.right, (example.text, verdict.reasons)
        assert not judge_edit(shown(example.source), example.source, example.text).right


def test_a_large_picture_is_judged_as_a_small_one():
    picture = shown(changed(0, colour="green")).resize((1024, 1024), Image.Resampling.LANCZOS)
    assert judge_edit(picture, SOURCE, "make the circle green").right


@pytest.mark.parametrize(
    ("result", "text", "reason"),
    [
        (changed(0, colour="green"), "make the circle green", ""),
        (changed(0, colour="green"), "make the red circle green", ""),
        (changed(0, colour="green"), "make the circle purple", "colour"),
        (changed(1, colour="green"), "make the circle green", "colour"),
        (changed(0, shape="star", colour="green"), "make the circle green", "shape"),
        (changed(0, colour="green", x=100), "make the circle green", "place"),
        (changed(0, colour="green", side=60), "make the circle green", "size"),
        (dataclasses.replace(SOURCE, things=SOURCE.things[:1]), "remove the square", ""),
        (dataclasses.replace(SOURCE, things=SOURCE.things[1:]), "remove the square", "colour"),
        (SOURCE, "remove the square", "count"),
        (
            dataclasses.replace(SOURCE, things=SOURCE.things[:1], background=("yellow",)),
            "remove the square",
            "background",
        ),
    ],
)
def test_the_judge_sees_what_changed_and_what_stayed(result, text, reason):
    verdict = judge_edit(shown(result), SOURCE, text)
    assert verdict.right == (not reason), verdict.reasons
    assert not reason or reason in {r.split(":")[0] for r in verdict.reasons}


def test_an_added_object_stands_where_the_words_say():
    star = Thing("green", "star", "small", 188, 64, 40)
    result = shown(dataclasses.replace(SOURCE, things=(*SOURCE.things, star)))
    assert judge_edit(result, SOURCE, "add a small green star at the top").reasons == (
        "place: green star is 60 px away",
    )
    star = dataclasses.replace(star, x=128 + 20)
    result = shown(dataclasses.replace(SOURCE, things=(*SOURCE.things, star)))
    assert judge_edit(result, SOURCE, "add a small green star at the top").right
    assert judge_edit(result, SOURCE, "add a green star at the top").right
    assert not judge_edit(result, SOURCE, "add a large green star at the top").right


def test_instructions_are_read_back_and_name_one_object():
    rng = random.Random(2)
    for _ in range(300):
        example = sample_example(rng)
        wanted = parse_instruction(example.text)
        if wanted.verb != "add":
            assert example.source.things[named(example.source, wanted)].shape == wanted.shape


@pytest.mark.parametrize("text", ["", "make the circle", "remove a circle", "add a blue star", "make the circle pink"])
def test_other_words_are_refused(text):
    with pytest.raises(ValueError, match="not an instruction"):
        parse_instruction(text)


def test_a_name_that_fits_no_object_or_two_is_refused():
    two = Scene((*SOURCE.things, Thing("green", "circle", "", 190, 60, 60)), ("white",))
    for text in ("remove the circle", "remove the star", "remove the blue circle"):
        with pytest.raises(ValueError, match=r"names [02] objects"):
            named(two, parse_instruction(text))


def test_held_out_instructions_never_come_up_in_training():
    rng = random.Random(3)
    for _ in range(1000):
        example = sample_example(rng)
        wanted = parse_instruction(example.text)
        if wanted.verb == "add":
            thing, detail = example.target.things[-1], wanted.position
        else:
            thing, detail = example.source.things[named(example.source, wanted)], wanted.new_colour
        assert not held_out(wanted.verb, thing, detail)


def test_a_table_does_not_depend_on_the_number_of_processes():
    alone, shared = (sample_table(1010, 3, num_workers=n) for n in (1, 2))
    assert torch.equal(alone.target, shared.target)
    assert torch.equal(alone.ids, shared.ids)
    assert int(alone.lengths.max()) <= INSTRUCTION_TOKENS


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    rng = random.Random(5)
    columns = tabulate([scenes.sample_scene(rng) for _ in range(3)])
    return draw(*map(torch.from_numpy, columns))


def _as_pillow(pictures: torch.Tensor) -> list[Image.Image]:
    values = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(v) for v in values]


@pytest.mark.parametrize("side", [resize.LATENTS_SIDE, resize.VISION_SIDE])
def test_pictures_are_resized_as_the_pipeline_resizes_them(pictures, side):
    ours = _as_pillow(resize.resize(pictures, side))
    for small, large in zip(_as_pillow(pictures), ours, strict=True):
        theirs = small.resize((side, side), resample=Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(large, np.int16) - np.asarray(theirs, np.int16)).max() <= 1


def test_the_vision_tower_and_the_prompt_equal_the_library_ones(pictures):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    encoder = models.build_text_encoder(tokenizer).eval()
    shown = [picture.resize((resize.VISION_SIDE,) * 2, Image.Resampling.LANCZOS) for picture in _as_pillow(pictures)]
    processor = Qwen2VLImageProcessorPil(patch_size=models.PATCH, merge_size=models.MERGE)
    processed = processor(images=shown, return_tensors="pt")
    flat = models.patches(resize.resize(pictures, resize.VISION_SIDE))
    components = models.principal_components(flat.flatten(0, 1), models.VISION["hidden_size"])
    models.set_patch_embedding(encoder, components)
    text = "make the circle green"
    picture = "<|image_pad|>" * models.NUM_FEATURES
    ids = tokenizer([PREFIX + BEFORE_PICTURE + picture + AFTER_PICTURE + text + SUFFIX] * 3, return_tensors="pt")
    prefix = torch.tensor(tokenizer(PREFIX + BEFORE_PICTURE).input_ids)
    tail = torch.tensor([tokenizer(AFTER_PICTURE + text + SUFFIX).input_ids] * 3)
    with torch.no_grad():
        wanted = encoder(
            **ids,
            pixel_values=processed["pixel_values"],
            image_grid_thw=processed["image_grid_thw"],
            output_hidden_states=True,
        ).hidden_states[-1][:, PREFIX_TOKENS:]
        tables = base.text_tables(encoder, ids.input_ids.shape[1]), models.vision_tables(encoder)
        got = models.encode_prompt(encoder, prefix, flat @ components.T, tail, *tables)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2, "the pictures differ"
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=2e-3)


def test_the_autoencoder_computes_what_was_trained(pictures):
    torch.manual_seed(0)
    pictures = pictures[:1]
    vae = AutoencoderKLQwenImage(**autoencoder.CONFIG)
    inner = autoencoder.InnerAutoencoder(vae)
    # A trained decoder gives small pictures with sharp edges; here they are the input.
    small = pictures.clone()
    inner.decode = lambda latents: small
    large = resize.resize(pictures, resize.LATENTS_SIDE)
    with torch.no_grad():
        reduced = resize.box(large, autoencoder.SHRINK)
        blurred = autoencoder._blur(pictures, inner.enlarged_and_shrunk)
        assert (reduced - blurred).abs().max() < 0.1
        assert (reduced - blurred).abs().mean() < 2e-3
        features = torch.zeros(1, inner.to_rgb.in_channels, 1, 256, 256)
        features[:, :3, 0] = pictures
        features[:, autoencoder._CONSTANT] = 1
        inner.to_rgb.weight[:, :, 0, 0] = torch.eye(3, inner.to_rgb.in_channels)
        inner.to_rgb.bias.zero_()
        autoencoder.set_outer_levels(inner)
        wanted = autoencoder.encode_small(vae, reduced)
        got = vae.encode(large.unsqueeze(2)).latent_dist.mode()[:, :, 0]
        torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)
        x = vae.decoder.up_blocks[autoencoder._INNER_UP - 1].upsamplers[0](features)
        for block in vae.decoder.up_blocks[autoencoder._INNER_UP :]:
            x = block(x)
        out = vae.decoder.conv_out(torch.nn.functional.silu(vae.decoder.norm_out(x)))[:, :, 0]
        assert out.shape[-1] == resize.LATENTS_SIDE
        wanted = autoencoder._blur(pictures, inner.interpolated_and_shrunk)
        torch.testing.assert_close(resize.box(out, autoencoder.SHRINK), wanted, atol=5e-3, rtol=5e-3)


def test_one_channel_of_the_decoder_stays_constant_while_it_trains(pictures):
    torch.manual_seed(0)
    inner = autoencoder.InnerAutoencoder(AutoencoderKLQwenImage(**autoencoder.CONFIG))
    optimizer = torch.optim.SGD([p for p in inner.parameters() if p.requires_grad], lr=0.1)
    noise = torch.zeros(3, autoencoder.CONFIG["z_dim"], autoencoder.CELLS, autoencoder.CELLS)
    labels = torch.zeros(3, 13, autoencoder.CELLS, autoencoder.CELLS)
    inner(pictures, noise, labels).backward()
    optimizer.step()
    inner.hold_constant_channel()
    features = []
    block = inner.vae.decoder.up_blocks[autoencoder._INNER_UP - 1]
    block.resnets[-1].register_forward_hook(lambda module, args, output: features.append(output))
    with torch.no_grad():
        inner(pictures, noise, labels)
    assert torch.equal(features[0][:, autoencoder._CONSTANT], torch.ones_like(features[0][:, 0]))
    assert features[0][:, 0].std() > 0
