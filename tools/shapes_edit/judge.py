"""Hold an edited picture against its source and its instruction. Plain numpy, no network.

What the instruction does not name must stay: the number of objects, the colour, shape, place and size of each, and the
background. Lengths are pixels of a 256 x 256 picture.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
from PIL import Image

from tools.shapes import scenes
from tools.shapes.judge import POSITION_TOLERANCE, Found, Verdict, fit_background, read
from tools.shapes.scenes import Scene, Thing
from tools.shapes_edit.edits import named, parse_instruction

MOVED = 12.0  # farthest that an object may stray along either axis [px]
GROWN = 0.12  # largest change of the side of an object, as a share of it, but not less than
GROWN_LEAST = 6.0  # this many pixels
BACKGROUND_DISTANCE = 20.0  # largest mean RGB distance of the background's rows from those of the source


def expected_things(source: Scene, text: str) -> tuple[Thing, ...]:
    """The objects of the result. One that is added has side 0 and the middle point of its position."""
    wanted = parse_instruction(text)
    if wanted.verb == "add":
        x, y = scenes.POSITIONS[wanted.position]
        return (*source.things, Thing(wanted.colour, wanted.shape, wanted.size, x, y, 0))
    index = named(source, wanted)
    changed = () if wanted.verb == "remove" else (replace(source.things[index], colour=wanted.new_colour),)
    return (*source.things[:index], *changed, *source.things[index + 1 :])


def _faults(expected: tuple[Thing, ...], found: tuple[Found, ...]) -> list[str]:
    """What is wrong when `found[i]` is taken for `expected[i]`."""
    faults = []
    for want, got in zip(expected, found, strict=True):
        name = f"{want.colour} {want.shape}"
        if want.colour != got.colour:
            faults.append(f"colour: {name} is {got.colour}")
        if want.shape != got.shape:
            faults.append(f"shape: {name} is {got.shape}")
        far = max(abs(want.x - got.x), abs(want.y - got.y))
        if far > (MOVED if want.side else POSITION_TOLERANCE):
            faults.append(f"place: {name} is {far:.0f} px away")
        if want.side and abs(got.side - want.side) > max(GROWN_LEAST, GROWN * want.side):
            faults.append(f"size: {name} has side {got.side:.0f}, should have {want.side}")
        if not want.side and want.size and got.size != want.size:
            faults.append(f"size: {name} should be {want.size}, is {got.size or 'middle'}")
    return faults


def judge_edit(picture: Image.Image, source: Scene, text: str) -> Verdict:
    """Whether a picture shows the source with just that change. It is shrunk to 256 x 256 pixels first."""
    side = scenes.PICTURE_SIZE
    if picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.BOX)
    expected = expected_things(source, text)
    found, background = read(picture)
    faults: list[str] = []
    if len(found) != len(expected):
        faults.append(f"count: {len(found)} objects, should be {len(expected)}")
    else:
        faults += min((_faults(expected, order) for order in permutations(found)), key=len)
    rows = fit_background(np.asarray(picture.convert("RGB"), dtype=np.float64))
    distance = float(np.linalg.norm(rows - scenes.draw_background(source.background)[:, :1], axis=2).mean())
    if background != source.background or distance > BACKGROUND_DISTANCE:
        faults.append(f"background: {' to '.join(background)}, {distance:.0f} from {' to '.join(source.background)}")
    return Verdict(not faults, tuple(faults), found, background)
