"""Random scenes of coloured shapes: sampling, drawing, captions and the way back from a caption.

Grammar (closed; every caption this module writes is read back by `parse_caption`)::

    caption    := body [" on " background]
    body       := object [" " position]                                    one object
                | object " " relation " " object                           two objects
                | object " and " object
                | object " " relation " " object " and " relation " " object
                | object ", " object " and " object                        three objects
    object     := article [size] colour shape      e.g. "a large red circle"
    size       := "large" | "small"                (not said: a middle size)
    relation   := "left of" | "right of" | "above" | "below"
    position   := "on the left" | "on the right" | "at the top" | "at the bottom" | "in the center"
    background := article colour " background"
                | article colour " to " colour " gradient background"      top colour, then bottom colour

With three objects both relations speak about the *first* object: "a red circle left of a blue
square and above a green star" puts the circle left of the square and above the star.

All lengths are pixels of a 256 x 256 picture, x to the right, y downwards.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations

import numpy as np
from PIL import Image, ImageDraw

PICTURE_SIZE = 256
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 50),
    "green": (30, 160, 70),
    "blue": (40, 90, 220),
    "purple": (140, 50, 180),
    "white": (250, 250, 250),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
GRID = 8  # middles and sides are multiples of this [px]: the fewer pictures of the same words, the sooner learnt
# Lowest and highest side of the bounding box [px] per size word ("" is the unsaid middle size).
SIZES: dict[str, tuple[int, int]] = {"small": (40, 40), "": (64, 64), "large": (88, 104)}
RELATIONS = ("left of", "right of", "above", "below")
# Middle point (x, y) of a named position; the drawn one lies within POSITION_JITTER of it.
POSITIONS: dict[str, tuple[int, int]] = {
    "on the left": (64, 128),
    "on the right": (192, 128),
    "at the top": (128, 64),
    "at the bottom": (128, 192),
    "in the center": (128, 128),
}
POSITION_JITTER = 8
BORDER = 10  # nothing is drawn this close to the edge, so that the border always shows the background
GAP = 10  # least free space between the boxes of two objects
SLANT = 0.6  # a relation may be said when the offset across it is at most this share of that along it
CONTRAST = 85  # least RGB distance of an object from its background
HELD_OUT_SHARE = 10  # one combination in this many is never trained on
_OVERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One object: its words (`size` is "small", "large" or "") and its bounding box (middle, side)."""

    colour: str
    shape: str
    size: str = ""
    x: float = 0.0
    y: float = 0.0
    side: int = 0


@dataclass(frozen=True)
class Scene:
    """A whole picture. `background` holds one colour, or two (top, bottom) for a gradient."""

    things: tuple[Thing, ...]
    background: tuple[str, ...]
    position: str = ""  # only with one object


@dataclass(frozen=True)
class Expected:
    """What a caption asks for. A relation is (index, word, index); an empty background asks for none."""

    things: tuple[Thing, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: tuple[str, ...] = ()
    position: str = ""


# ---------------------------------------------------------------- drawing


def unit_polygon(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape in a box of side 1 whose top left corner is (0, 0); not for circles."""
    if shape == "square":
        return [(0, 0), (1, 0), (1, 1), (0, 1)]
    if shape == "triangle":
        return [(0.5, 0), (1, 1), (0, 1)]
    if shape == "cross":
        a, b = 0.32, 0.68
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    angles, radii = [i * math.pi / 5 for i in range(10)], [1.0, 0.45] * 5  # a star, its points and its notches
    xs, ys = ([r * f(a) for r, a in zip(radii, angles, strict=True)] for f in (math.sin, lambda a: -math.cos(a)))
    return [
        ((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys))) for x, y in zip(xs, ys, strict=True)
    ]


@cache
def shape_mask(shape: str, side: int) -> np.ndarray:
    """Anti-aliased coverage of a shape, float32 [side, side] in 0..1."""
    fine = side * _OVERSAMPLING
    picture = Image.new("L", (fine, fine), 0)
    draw = ImageDraw.Draw(picture)
    if shape == "circle":
        draw.ellipse((0, 0, fine - 1, fine - 1), fill=255)
    else:
        draw.polygon([(x * (fine - 1), y * (fine - 1)) for x, y in unit_polygon(shape)], fill=255)
    return np.asarray(picture.reduce(_OVERSAMPLING), dtype=np.float32) / 255.0


def draw_background(background: tuple[str, ...]) -> np.ndarray:
    """Float32 [256, 256, 3] in 0..255; a gradient runs from top to bottom."""
    top, bottom = (np.asarray(COLOURS[c], dtype=np.float32) for c in (background[0], background[-1]))
    t = np.linspace(0.0, 1.0, PICTURE_SIZE, dtype=np.float32)[:, None, None]
    return np.broadcast_to(top + (bottom - top) * t, (PICTURE_SIZE, PICTURE_SIZE, 3)).copy()


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, uint8 [256, 256, 3]."""
    canvas = draw_background(scene.background)
    for thing in scene.things:
        x0, y0 = round(thing.x - thing.side / 2), round(thing.y - thing.side / 2)
        mask = shape_mask(thing.shape, thing.side)[:, :, None]
        patch = canvas[y0 : y0 + thing.side, x0 : x0 + thing.side]
        patch += mask * (np.asarray(COLOURS[thing.colour], dtype=np.float32) - patch)
    return (canvas + 0.5).astype(np.uint8)


# ---------------------------------------------------------------- what may be seen in training


def left_out(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % HELD_OUT_SHARE == 0


@cache
def pair_held_out(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether these two (colour, shape) pairs never stand in one training picture."""
    return left_out("pair:" + "|".join(sorted(" ".join(p) for p in (first, second))))


def held_out(things: tuple[Thing, ...], background: tuple[str, ...], position: str = "") -> bool:
    """Whether training must not see this combination: by pairs, or by all the words for one object."""
    if len(things) == 1:
        t = things[0]
        return left_out("single:" + "|".join((t.size, t.colour, t.shape, position, *background)))
    return any(pair_held_out((a.colour, a.shape), (b.colour, b.shape)) for a, b in combinations(things, 2))


@cache
def free_colours(background: tuple[str, ...]) -> tuple[str, ...]:
    """Object colours that stand out everywhere on a background (also on the mixed colours of a gradient)."""
    top, bottom = (np.asarray(COLOURS[c], dtype=np.float64) for c in (background[0], background[-1]))
    line = top + (bottom - top) * np.linspace(0, 1, 33)[:, None]
    return tuple(c for c, rgb in COLOURS.items() if np.linalg.norm(line - np.asarray(rgb), axis=1).min() >= CONTRAST)


def relation_between(a: Thing, b: Thing) -> str | None:
    """The word that holds for `a` seen from `b`, or None where the picture leaves it open."""
    dx, dy = b.x - a.x, b.y - a.y
    room = (a.side + b.side) / 2 + GAP
    if abs(dx) >= room and abs(dy) <= SLANT * abs(dx):
        return "left of" if dx > 0 else "right of"
    if abs(dy) >= room and abs(dx) <= SLANT * abs(dy):
        return "above" if dy > 0 else "below"
    return None


def apart(a: Thing, b: Thing) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.side + b.side) / 2 + GAP


def _sample_background(rng: random.Random) -> tuple[str, ...]:
    names = list(COLOURS)
    while True:
        background = tuple(rng.sample(names, 2)) if rng.random() < 0.2 else (rng.choice(names),)
        if len(free_colours(background)) >= 3:
            return background


def _sample_words(rng: random.Random, count: int, background: tuple[str, ...]) -> list[Thing]:
    colours = free_colours(background)
    words: list[tuple[str, str]] = []
    while len(words) < count:
        pair = (rng.choice(colours), rng.choice(SHAPES))
        if pair not in words:
            words.append(pair)
    return [Thing(c, s, rng.choices(("", "small", "large"), (0.5, 0.25, 0.25))[0]) for c, s in words]


def _on_grid(rng: random.Random, low: int, high: int) -> int:
    return GRID * rng.randint(-(-low // GRID), high // GRID)


def place(rng: random.Random, thing: Thing, position: str) -> Thing:
    side = _on_grid(rng, *SIZES[thing.size])
    near, far = BORDER + side // 2, PICTURE_SIZE - BORDER - side // 2
    jitter = POSITION_JITTER if position else PICTURE_SIZE
    x, y = (_on_grid(rng, max(near, v - jitter), min(far, v + jitter)) for v in POSITIONS[position or "in the center"])
    return Thing(thing.colour, thing.shape, thing.size, x, y, side)


def sample_scene(rng: random.Random, count: int | None = None, want_held_out: bool = False) -> Scene:
    """A scene of `count` objects (random: 1, 2 or 3), either all trainable or all held out."""
    count = count or rng.choices((1, 2, 3), (0.2, 0.3, 0.5))[0]
    while True:
        background = _sample_background(rng)
        things = _sample_words(rng, count, background)
        position = rng.choice(tuple(POSITIONS)) if count == 1 and rng.random() < 0.5 else ""
        if held_out(tuple(things), background, position) != want_held_out:
            continue
        for _ in range(60):
            placed = [place(rng, thing, position) for thing in things]
            if all(relation_between(placed[0], other) for other in placed[1:]) and (
                count < 3 or apart(placed[1], placed[2])
            ):
                return Scene(tuple(placed), background, position)


# ---------------------------------------------------------------- captions


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def say(thing: Thing) -> str:
    return article(" ".join(w for w in (thing.size, thing.colour, thing.shape) if w))


def _say_background(background: tuple[str, ...]) -> str:
    gradient = " gradient" if len(background) == 2 else ""
    return " on " + article(" to ".join(background) + gradient + " background")


def caption(scene: Scene, rng: random.Random, relations: bool | None = None) -> str:
    """One of the true captions of a scene. `relations` forces (True) or forbids (False) naming them."""
    order = list(permutations(scene.things))
    rng.shuffle(order)
    said = order[0]
    body = say(said[0]) + (f" {scene.position}" if scene.position else "")
    if len(said) > 1:
        if relations is None:
            relations = rng.random() < 0.85
        if relations:
            # Not every order will do: the first object needs a clear relation to each of the others.
            said = next(o for o in order if all(relation_between(o[0], other) for other in o[1:]))
            body = say(said[0]) + " " + " and ".join(f"{relation_between(said[0], o)} {say(o)}" for o in said[1:])
        else:
            body = ", ".join(map(say, said[:-1])) + " and " + say(said[-1])
    return body + ("" if rng.random() < 0.04 else _say_background(scene.background))


_COLOUR, _SHAPE = "|".join(COLOURS), "|".join(SHAPES)
_THING = re.compile(rf"an? (?:(large|small) )?({_COLOUR}) ({_SHAPE})")
_BACKGROUND = re.compile(rf" on an? ({_COLOUR})(?: to ({_COLOUR}) gradient)? background$")
_POSITION = re.compile(rf" ({'|'.join(POSITIONS)})$")


def parse_caption(text: str) -> Expected:
    """Read a caption back. Raises ValueError where it is not in the grammar."""
    background: tuple[str, ...] = ()
    position, body = "", text
    if match := _BACKGROUND.search(body):
        background, body = tuple(c for c in match.groups() if c), body[: match.start()]
    if match := _POSITION.search(body):
        position, body = match.group(1), body[: match.start()]
    things = tuple(Thing(m[2], m[3], m[1] or "") for m in _THING.finditer(body))
    joints = tuple(_THING.sub("|", body).split("|"))
    if not things or joints[0] or joints[-1] or (position and len(things) > 1):
        raise ValueError(f"not a caption of coloured shapes: {text!r}")
    middle = tuple(j.strip() for j in joints[1:-1])
    if middle in ((), ("and",), (",", "and")):
        return Expected(things, (), background, position)
    words = (middle[0], *(m.removeprefix("and ") for m in middle[1:]))
    if len(things) > 3 or any(w not in RELATIONS for w in words):
        raise ValueError(f"not a caption of coloured shapes: {text!r}")
    return Expected(things, tuple((0, w, i + 1) for i, w in enumerate(words)), background, position)
