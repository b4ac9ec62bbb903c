"""Follow the object of a clip from frame to frame and hold it against the caption. Plain numpy, no network.

Each frame is read by `tools.shapes.judge.read`. A clip is right if every frame shows exactly one object of the
asked colour and shape on the asked background, and the object goes the asked way: never back, never aside, without
jumps. Lengths are pixels, x to the right, y downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tools.shapes.judge import Found, read
from tools.shapes_wan.clips import DIRECTIONS, parse_caption

MIN_TRAVEL = 30.0  # from the first frame to the last; training clips go 60
MAX_BACK = 1.5  # against the direction, from one frame to the next
MAX_JUMP = 8.0  # along the direction, from one frame to the next; training clips go 4
MAX_ASIDE = 5.0  # farthest from the first place, across the direction


@dataclass(frozen=True)
class ClipVerdict:
    """Whether a clip shows what its caption says, why not, and what was read: one object per frame, if there is one."""

    right: bool
    reasons: tuple[str, ...]
    path: tuple[tuple[float, float], ...]


def judge(frames: Sequence[np.ndarray | Image.Image], caption: str) -> ClipVerdict:
    """Whether `frames`, uint8 [H, W, 3] each, show what the caption says. Only the first reason of a kind is given."""
    words = parse_caption(caption)
    reasons: dict[str, str] = {}
    path = []
    for index, frame in enumerate(frames):
        found, background = read(frame)
        if words.background and background != (words.background,):
            reasons.setdefault("background", f"{' to '.join(background)} in frame {index}, not {words.background}")
        if len(found) != 1:
            reasons.setdefault("count", f"{len(found)} objects in frame {index}")
            continue
        for kind in ("colour", "shape"):
            seen, asked = getattr(found[0], kind), getattr(words, kind)
            if seen != asked:
                reasons.setdefault(kind, f"{seen} in frame {index}, not {asked}")
        path.append(_middle(found[0]))
    if "count" not in reasons:
        fault = _fault_of_path(np.array(path), words.direction)
        if fault:
            reasons["direction"] = fault
    texts = tuple(f"{kind}: {text}" for kind, text in reasons.items())
    return ClipVerdict(not texts, texts, tuple(path))


def _middle(found: Found) -> tuple[float, float]:
    return found.x, found.y


def _fault_of_path(path: np.ndarray, direction: str) -> str:
    """What is wrong with middles [F, 2] that should go one way, or nothing."""
    x, y = DIRECTIONS[direction]
    along, across = path @ np.array((x, y)), path @ np.array((y, x))
    steps = np.diff(along)
    if along[-1] - along[0] < MIN_TRAVEL:
        return f"goes {along[-1] - along[0]:.0f} px {direction}, should be {MIN_TRAVEL:.0f} at least"
    if steps.min() < -MAX_BACK:
        return f"goes back {-steps.min():.1f} px after frame {steps.argmin()}"
    if steps.max() > MAX_JUMP:
        return f"jumps {steps.max():.1f} px after frame {steps.argmax()}"
    aside = np.abs(across - across[0]).max()
    return f"strays {aside:.1f} px from a straight line" if aside > MAX_ASIDE else ""
