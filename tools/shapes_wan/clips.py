"""Clips of one coloured shape that moves: their words, captions, and the way back from a caption.

Grammar (closed; every caption this module writes is read back by `parse_caption`)::

    caption    := article colour shape " moving " direction [" on " background]
    direction  := "left" | "right" | "up" | "down"
    background := article colour " background"

Colours and shapes are those of `tools.shapes.scenes`. A background that is not said may be any.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from tools.shapes import scenes

NUM_FRAMES = 16
PICTURE_SIZE = 128  # pixels
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x, y
UNSAID_SHARE = 0.2  # of captions that leave the background out


@dataclass(frozen=True)
class Words:
    """What a caption says; an empty background is not said."""

    colour: str
    shape: str
    direction: str
    background: str = ""


def held_out(words: Words) -> bool:
    """Whether training must not see this colour, shape and direction together: one combination in ten."""
    return scenes.held_out((scenes.Thing(words.colour, words.shape),), (), words.direction)


def combinations(want_held_out: bool = False) -> list[Words]:
    """All clips that can be told apart: every background whose colour the object stands out from."""
    drawn = (
        Words(colour, shape, direction, background)
        for background in scenes.COLOURS
        for colour in scenes.free_colours((background,))
        for shape in scenes.SHAPES
        for direction in DIRECTIONS
    )
    return [words for words in drawn if held_out(words) == want_held_out]


def sample_captions(count: int, rng: random.Random, want_held_out: bool = False) -> list[str]:
    """Captions of random clips, with and without their background."""
    chosen = rng.choices(combinations(want_held_out), k=count)
    return [caption(words, say_background=rng.random() >= UNSAID_SHARE) for words in chosen]


def caption(words: Words, say_background: bool = True) -> str:
    """The caption of a clip."""
    background = ""
    if words.background and say_background:
        background = f" on {_article(words.background)} {words.background} background"
    return f"{_article(words.colour)} {words.colour} {words.shape} moving {words.direction}{background}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


_COLOUR = "|".join(scenes.COLOURS)
_CAPTION = re.compile(
    rf"an? ({_COLOUR}) ({'|'.join(scenes.SHAPES)}) moving ({'|'.join(DIRECTIONS)})(?: on an? ({_COLOUR}) background)?"
)


def parse_caption(text: str) -> Words:
    """Read a caption back. Raises ValueError where it is not in the grammar."""
    match = _CAPTION.fullmatch(text)
    if match is None:
        raise ValueError(f"not a caption of a moving shape: {text!r}")
    colour, shape, direction, background = match.groups()
    return Words(colour, shape, direction, background or "")
