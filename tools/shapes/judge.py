"""Read a picture of coloured shapes back and hold it against its caption. Plain numpy, no network.

Reading: take the background of each row from the left and right border, take what differs from it,
split that into connected blobs, and name each blob's colour (nearest of the palette), shape (best overlap with
a template) and size (side of its box). Lengths are pixels, x to the right, y downwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from PIL import Image

from tools.shapes import scenes

BORDER = 6  # width of the strips that show the background
BLOB_DISTANCE = 42.0  # RGB distance from the background that makes a pixel part of an object
PEAK_DISTANCE = 70.0  # a blob whose inner median stays below this is a shade of the background
SMOOTH_ROWS = 4
MIN_AREA = 200  # a smaller blob is dirt [px]
COLOUR_TOLERANCE = 60.0  # RGB distance to the palette beyond which a colour has no name
GRADIENT_DISTANCE = 45.0  # RGB distance top to bottom from which a background is a gradient
UNIFORM_SHARE = 0.8  # share of a blob's inner pixels that must have its colour
MIN_OVERLAP = 0.7  # intersection over union with the template
MAX_ASPECT = 1.35
SIZE_LIMITS = (52.0, 78.0)  # box side [px]: below is small, above is large
POSITION_TOLERANCE = 32  # farthest from a named position along either axis [px]
_GRID = 48


@dataclass(frozen=True)
class Found:
    """One blob. `colour` and `shape` are "?" where the picture does not say."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows all its caption says, why not, and what was read."""

    right: bool
    reasons: tuple[str, ...]
    found: tuple[Found, ...]
    background: tuple[str, ...]


def nearest_colour(rgb: np.ndarray) -> str:
    """Palette name of an RGB value [3], or "?" when none is near."""
    distance = {name: float(np.linalg.norm(rgb - np.asarray(c))) for name, c in scenes.COLOURS.items()}
    best = min(distance, key=distance.__getitem__)
    return best if distance[best] <= COLOUR_TOLERANCE else "?"


def fit_background(pixels: np.ndarray) -> np.ndarray:
    """Background per row [H, 1, 3] of a picture [H, W, 3]: border medians, smoothed over some rows."""
    strips = np.concatenate([pixels[:, :BORDER], pixels[:, -BORDER:]], axis=1)
    rows = np.pad(np.median(strips, axis=1), ((SMOOTH_ROWS, SMOOTH_ROWS), (0, 0)), mode="edge")
    total = np.cumsum(np.pad(rows, ((1, 0), (0, 0))), axis=0)
    width = 2 * SMOOTH_ROWS + 1
    return ((total[width:] - total[:-width]) / width)[:, None, :]


def name_background(fit: np.ndarray) -> tuple[str, ...]:
    """One colour, or (top, bottom) for a gradient."""
    top, bottom = fit[BORDER, 0], fit[-1 - BORDER, 0]
    if np.linalg.norm(top - bottom) < GRADIENT_DISTANCE:
        return (nearest_colour((top + bottom) / 2),)
    return nearest_colour(top), nearest_colour(bottom)


def _row_runs(row: np.ndarray) -> list[tuple[int, int]]:
    """Start and end (exclusive) of each run of true pixels in a row [W]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def blobs(mask: np.ndarray) -> list[np.ndarray]:
    """Connected parts (8 neighbours) of a mask [H, W], each as a mask, those under MIN_AREA left out."""
    parent: list[int] = []
    placed: list[tuple[int, int, int, int]] = []

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    above: list[tuple[int, int, int]] = []
    for y, row in enumerate(mask):
        here = []
        for start, end in _row_runs(row):
            label = len(parent)
            parent.append(label)
            for other_start, other_end, other in above:
                if other_start <= end and start <= other_end:
                    parent[root(other)] = root(label)
            here.append((start, end, label))
            placed.append((y, start, end, label))
        above = here
    parts: dict[int, np.ndarray] = {}
    for y, start, end, label in placed:
        parts.setdefault(root(label), np.zeros_like(mask))[y, start:end] = True
    return [part for part in parts.values() if part.sum() >= MIN_AREA]


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """First and last-plus-one row and column of a mask's true pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def _to_grid(mask: np.ndarray) -> np.ndarray:
    """A mask's box stretched to a square grid of fixed size."""
    y0, y1, x0, x1 = _box(mask)
    y = (y0 + (np.arange(_GRID) + 0.5) * (y1 - y0) / _GRID).astype(int)
    x = (x0 + (np.arange(_GRID) + 0.5) * (x1 - x0) / _GRID).astype(int)
    return mask[np.ix_(y, x)]


@cache
def _templates() -> dict[str, np.ndarray]:
    return {shape: _to_grid(scenes.shape_mask(shape, 96) > 0.5) for shape in scenes.SHAPES}


def name_shape(mask: np.ndarray) -> str:
    """The shape whose template overlaps best with a blob, or "?"."""
    y0, y1, x0, x1 = _box(mask)
    if max(y1 - y0, x1 - x0) > MAX_ASPECT * min(y1 - y0, x1 - x0):
        return "?"
    grid = _to_grid(mask)
    overlap = {shape: (grid & t).sum() / (grid | t).sum() for shape, t in _templates().items()}
    best = max(overlap, key=overlap.__getitem__)
    return best if overlap[best] >= MIN_OVERLAP else "?"


def _inner(mask: np.ndarray) -> np.ndarray:
    """A mask without its outermost two pixels, where colours blend into the background."""
    for _ in range(2):
        m = np.pad(mask, 1)
        smaller = m[1:-1, 1:-1] & m[:-2, 1:-1] & m[2:, 1:-1] & m[1:-1, :-2] & m[1:-1, 2:]
        mask = smaller if smaller.sum() >= 40 else mask
    return mask


def _name_colour(pixels: np.ndarray, mask: np.ndarray) -> str:
    inside = pixels[_inner(mask)]
    name = nearest_colour(np.median(inside, axis=0))
    if name == "?":
        return name
    near = np.linalg.norm(inside - np.asarray(scenes.COLOURS[name]), axis=1) <= COLOUR_TOLERANCE + 15
    return name if near.mean() >= UNIFORM_SHARE else "?"


def read(picture: np.ndarray | Image.Image) -> tuple[tuple[Found, ...], tuple[str, ...]]:
    """Objects and background of a picture, uint8 [256, 256, 3]."""
    pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture, dtype=np.float64)
    fit = fit_background(pixels)
    found = []
    distance = np.linalg.norm(pixels - fit, axis=2)
    for mask in blobs(distance > BLOB_DISTANCE):
        contrast = float(np.median(distance[_inner(mask)]))
        if contrast < PEAK_DISTANCE:
            continue
        mask = mask & (distance > contrast / 2)  # the edge lies where a soft border is half way
        y0, y1, x0, x1 = _box(mask)
        side = float(np.sqrt((y1 - y0) * (x1 - x0)))
        size = "small" if side < SIZE_LIMITS[0] else "large" if side > SIZE_LIMITS[1] else ""
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        found.append(Found(_name_colour(pixels, mask), name_shape(mask), size, x, y, side))
    return tuple(found), name_background(fit)


def relation_holds(a: Found, word: str, b: Found) -> bool:
    """Whether `a` is left of / right of / above / below `b`, the main direction of their offset."""
    dx, dy = b.x - a.x, b.y - a.y
    along, across = (dx, dy) if word in ("left of", "right of") else (dy, dx)
    return abs(along) >= abs(across) and (along > 0) == (word in ("left of", "above"))


def _faults(expected: scenes.Expected, found: tuple[Found, ...]) -> list[str]:
    """What is wrong when `found[i]` is taken for `expected.things[i]`."""
    faults = []
    for want, got in zip(expected.things, found, strict=True):
        for key in ("colour", "shape", "size"):
            asked, seen = getattr(want, key), getattr(got, key)
            if asked and asked != seen:
                faults.append(f"{key}: {want.colour} {want.shape} should be {asked}, is {seen or 'middle'}")
    for i, word, j in expected.relations:
        if not relation_holds(found[i], word, found[j]):
            faults.append(f"relation: {expected.things[i].shape} is not {word} {expected.things[j].shape}")
    if expected.position:
        x, y = scenes.POSITIONS[expected.position]
        if max(abs(found[0].x - x), abs(found[0].y - y)) > POSITION_TOLERANCE:
            faults.append(f"position: not {expected.position}")
    return faults


def judge(picture: np.ndarray | Image.Image, caption: str) -> Verdict:
    """Whether a picture shows exactly what its caption says. A size or background unsaid may be any."""
    expected = scenes.parse_caption(caption)
    found, background = read(picture)
    faults: list[str] = []
    if len(found) != len(expected.things):
        faults.append(f"count: {len(found)} objects, should be {len(expected.things)}")
    else:
        faults += min((_faults(expected, order) for order in permutations(found)), key=len)
    if expected.background and background != expected.background:
        faults.append(f"background: {' to '.join(background)}, should be {' to '.join(expected.background)}")
    return Verdict(not faults, tuple(faults), found, background)
