"""Clips of moving shapes: captions, the judge that follows an object, and the fast forward passes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tools.shapes import scenes
from tools.shapes_wan import clips, models, table, vae_train
from tools.shapes_wan.judge import judge
from tools.shapes_wan.loop import Loop
from tools.shapes_wan.tokenizer import build_tokenizer

RIGHT = "a red circle moving right on a white background"


def drawn(corners, colour="red", shape="circle", background="white", side=40):
    """Frames uint8 with one object at each of the `corners`, its left and top."""
    thing = [list(scenes.COLOURS).index(colour), scenes.SHAPES.index(shape)]
    things = torch.tensor([[[*thing, x, y, side] for x, y in corners]])
    index = list(scenes.COLOURS).index(background)
    pixels = table.draw_clips(torch.tensor([[index, index]]), things)[0]
    return ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def going(step=(3, 0), start=(10, 50), count=clips.NUM_FRAMES):
    return [(start[0] + i * step[0], start[1] + i * step[1]) for i in range(count)]


@pytest.mark.parametrize("want_held_out", [False, True])
def test_the_judge_reads_back_drawn_clips(want_held_out):
    torch.manual_seed(1)
    source = table.ClipTable(torch.device("cpu"), want_held_out)
    chosen, backgrounds, things = source.sample(12)
    pixels = ((table.draw_clips(backgrounds, things) + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).numpy()
    for index, frames in zip(chosen.tolist(), pixels, strict=True):
        words = source.words[index]
        assert clips.held_out(words) == want_held_out
        for said in (True, False):
            verdict = judge(frames, clips.caption(words, said))
            assert verdict.right, verdict.reasons


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        (RIGHT, ""),
        ("a red circle moving right", ""),
        (RIGHT.replace("red", "blue"), "colour"),
        (RIGHT.replace("circle", "star"), "shape"),
        (RIGHT.replace("right", "left"), "direction"),
        (RIGHT.replace("right", "up"), "direction"),
        (RIGHT.replace("white", "yellow"), "background"),
    ],
)
def test_verdicts(caption, kind):
    verdict = judge(drawn(going()), caption)
    assert verdict.right == (not kind)
    assert {reason.split(":")[0] for reason in verdict.reasons} == ({kind} if kind else set())
    assert len(verdict.path) == clips.NUM_FRAMES


def test_the_object_must_be_the_same_in_all_frames():
    frames, others = drawn(going()), drawn(going(), shape="star")
    two = drawn(going())
    two[5][80:128, 80:120] = drawn([(80, 85)], colour="blue")[0][80:128, 80:120]
    gone = frames.copy()
    gone[7] = 250
    for bad, kind in ((np.concatenate((frames[:15], others[15:])), "shape"), (two, "count"), (gone, "count")):
        assert [reason.split(":")[0] for reason in judge(bad, RIGHT).reasons] == [kind]


@pytest.mark.parametrize(
    ("corners", "fault"),
    [
        (going((1, 0)), "goes 15 px right, should be 30 at least"),
        (going((3, 1)), "strays 15.0 px from a straight line"),
        ([*going()[:8], *going((3, 0), (44, 50), 8)], "jumps 13.0 px after frame 7"),
        ([*going()[:8], *going((3, 0), (25, 50), 8)], "goes back 6.0 px after frame 7"),
    ],
)
def test_the_object_must_go_straight_and_smoothly(corners, fault):
    assert judge(drawn(corners), RIGHT).reasons == (f"direction: {fault}",)


def test_captions_round_trip():
    for words in clips.combinations() + clips.combinations(want_held_out=True):
        assert clips.parse_caption(clips.caption(words)) == words
        assert clips.parse_caption(clips.caption(words, say_background=False)).background == ""
    with pytest.raises(ValueError, match="not a caption"):
        clips.parse_caption("a red circle moving away")


def test_held_out_combinations_are_told_apart_from_trainable_ones():
    seen = {(w.colour, w.shape, w.direction) for w in clips.combinations()}
    unseen = {(w.colour, w.shape, w.direction) for w in clips.combinations(want_held_out=True)}
    assert not seen & unseen
    assert len(unseen) >= 10
    assert {w.direction for w in clips.combinations(want_held_out=True)} == set(clips.DIRECTIONS)
    first, second = (clips.sample_captions(20, random.Random(3), want_held_out=True) for _ in range(2))
    assert first == second
    assert all(clips.held_out(clips.parse_caption(text)) for text in first)


def test_each_word_is_one_token():
    tokenizer = build_tokenizer()
    ids, lengths = table.caption_tokens(clips.combinations(), tokenizer, torch.device("cpu"))
    assert ids.shape[2] == table.TEXT_TOKENS
    for row, words in enumerate(clips.combinations()):
        for column, said in enumerate((True, False)):
            assert lengths[row, column] == len(clips.caption(words, said).split()) + 1
    unknown = tokenizer.unk_token_id
    assert unknown not in tokenizer("Any other text: 1, 2!").input_ids


def test_fast_forward_passes_equal_the_library_ones():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    encoder = models.build_text_encoder(tokenizer).eval()
    transformer = models.build_transformer(layers=2, heads=2).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    padded = tokenizer(
        ["a red circle moving right", "", RIGHT], padding="max_length", max_length=512, return_tensors="pt"
    )
    ids, lengths = padded.input_ids[:, : table.TEXT_TOKENS], padded.attention_mask.sum(1)
    latents, sigma = torch.randn(3, 16, 3, 8, 8), torch.tensor([0.1, 0.6, 1.0])
    with torch.no_grad():
        full = encoder(padded.input_ids, padded.attention_mask).last_hidden_state * padded.attention_mask[:, :, None]
        text = models.encode_text(encoder, ids, lengths, models.position_buckets(encoder, ids.shape[1]))
        torch.testing.assert_close(text, full[:, : text.shape[1]], atol=1e-5, rtol=1e-5)
        wanted = transformer(latents, 1000 * sigma, full, return_dict=False)[0]
        got = models.predict(transformer, latents, text, lengths, sigma, *models.rotary_tables(transformer, 3))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_the_autoencoder_of_single_frames_is_the_librarys_and_leaves_it_as_it_was():
    torch.manual_seed(0)
    vae = vae_train.build_vae().eval()
    vae_train.clear_unused_slices(vae)
    frames = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(frames).latent_dist.mode()
        pixels = vae.decode(latents).sample
        with vae_train.single_frames():
            coded = vae_train.encode(vae, frames[0].transpose(0, 1))
            shown = vae_train.decode(vae, latents[0].transpose(0, 1)).clamp(-1, 1)
        assert torch.equal(vae.decode(latents).sample, pixels)
    torch.testing.assert_close(coded.transpose(0, 1), latents[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shown.transpose(0, 1), pixels[0], atol=1e-5, rtol=1e-5)


def test_a_training_run_ends_with_its_time_at_the_lowest_rate_and_averages_the_weights():
    model, rate, rates = torch.nn.Linear(4, 1), torch.zeros(()), []
    target = torch.ones(64, 1)

    def loss():
        rates.append(float(rate))
        return (model(torch.ones(64, 4)) - target).square().mean()

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    loop = Loop(model, loss, [optimizer], [rate], [0.1], schedule=lambda p: 1 - p, ema_decay=0.9, num_warmup=5)
    loop.run(0.01, 64, capture=False, on_progress=lambda: None)
    assert max(rates) > 0.05
    assert rates[-1] < 0.02
    assert float(loss().detach()) < 1e-3
    assert float((loop.average(torch.ones(1, 4)) - 1).detach().abs()) < 0.05
