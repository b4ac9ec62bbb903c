"""Clips as numbers, sampled and drawn on the device that trains.

Legend: N clips, F frames of a clip, L tokens of a caption. Lengths are pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import T5Tokenizer

from tools.shapes import scenes
from tools.shapes.table import draw
from tools.shapes_wan.clips import DIRECTIONS, NUM_FRAMES, PICTURE_SIZE, UNSAID_SHARE, Words, caption, combinations

SIDE = 40  # of the box of an object
SPEED = 4  # pixels per frame
GRID = 4  # corners are multiples of this
BORDER = 8  # nothing is drawn this close to the edge, so that the border always shows the background
TEXT_TOKENS = 15  # the longest caption has 10
_COLOURS = list(scenes.COLOURS)


class ClipTable:
    """All clips that may be sampled, with the captions of each, on one device."""

    def __init__(self, device: torch.device, want_held_out: bool = False) -> None:
        self.device = device
        self.words = combinations(want_held_out)
        rows = [
            (_COLOURS.index(w.background), _COLOURS.index(w.colour), scenes.SHAPES.index(w.shape)) for w in self.words
        ]
        self.rows = torch.tensor(rows, device=device)
        self.directions = torch.tensor([DIRECTIONS[w.direction] for w in self.words], device=device)

    def sample(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which words [N], backgrounds [N, 2] and things [N, F, 5], as `tools.shapes.table.draw` takes them.

        All objects have one side and one speed, and stand on a grid: the fewer clips of the same words, the sooner
        learnt. The path lies anywhere in the picture.
        """
        chosen = torch.randint(len(self.words), (count,), device=self.device)
        travel = self.directions[chosen] * SPEED * (NUM_FRAMES - 1)
        low = BORDER - travel.clamp(max=0)
        high = PICTURE_SIZE - BORDER - SIDE - travel.clamp(min=0)
        first = GRID * _between(low // GRID, high // GRID)
        steps = torch.arange(NUM_FRAMES, device=self.device)[:, None] * SPEED
        corners = first[:, None] + self.directions[chosen][:, None] * steps
        return chosen, *self._rows(chosen, corners, torch.full_like(corners[:, :, :1], SIDE))

    def sample_frames(self, count: int) -> tuple[Tensor, Tensor]:
        """Backgrounds [N, 2] and things [N, 1, 5] of single frames: off the grid too, a little smaller and larger."""
        chosen = torch.randint(len(self.words), (count,), device=self.device)
        side = SIDE + 2 * torch.randint(-2, 3, (count, 1), device=self.device)
        corners = _between(torch.full_like(side, BORDER).expand(-1, 2), PICTURE_SIZE - BORDER - side.expand(-1, 2))
        return self._rows(chosen, corners[:, None], side[:, None])

    def _rows(self, chosen: Tensor, corners: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
        background, colour, shape = self.rows[chosen].unbind(1)
        fixed = torch.stack((colour, shape), 1)[:, None].expand(-1, corners.shape[1], -1)
        return background[:, None].expand(-1, 2), torch.cat((fixed, corners, sides), 2)


def _between(low: Tensor, high: Tensor) -> Tensor:
    """Random whole numbers from `low` to `high`, both of which may come up."""
    return low + (torch.rand(low.shape, device=low.device) * (high - low + 1)).long()


def draw_clips(backgrounds: Tensor, things: Tensor) -> Tensor:
    """Backgrounds [N, 2] and things [N, F, 5] to pixels [N, F, 3, height, width] in -1..1."""
    frames = things.shape[1]
    pixels = draw(backgrounds.repeat_interleave(frames, 0), things.flatten(0, 1)[:, None], size=PICTURE_SIZE)
    return pixels.unflatten(0, (-1, frames))


def caption_tokens(words: list[Words], tokenizer: T5Tokenizer, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [words, 2, L], 0 after the end, and lengths [words, 2] of each caption with and without background."""
    texts = [caption(w, say_background=said) for w in words for said in (True, False)]
    encoded = tokenizer(texts, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt")
    ids, lengths = encoded.input_ids, encoded.attention_mask.sum(1)
    return ids.view(-1, 2, TEXT_TOKENS).to(device), lengths.view(-1, 2).to(device)


def choose_captions(ids: Tensor, lengths: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """One caption of each of the `chosen` words: ids [N, L] and lengths [N]."""
    unsaid = (torch.rand(len(chosen), device=chosen.device) < UNSAID_SHARE).long()
    return ids[chosen, unsaid], lengths[chosen, unsaid]
