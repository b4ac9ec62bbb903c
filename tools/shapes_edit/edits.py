"""Instructions that change a scene: sampling, carrying out, and the way back from the words.

Grammar (closed; every instruction this module writes is read back by `parse_instruction`)::

    instruction := "make " name " " colour                      e.g. "make the circle green"
                 | "remove " name                               e.g. "remove the red square"
                 | "add " article [size] colour shape " " position
                                                                e.g. "add a small blue star on the left"
    name        := "the " [colour] shape                        without the colour where one object has that shape

Sizes, colours, shapes and positions are those of `tools/shapes/scenes.py`. A source shows one to three objects, or
one or two where a third is to be added.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

from tools.shapes import scenes
from tools.shapes.scenes import Scene, Thing

VERBS = ("make", "remove", "add")


@dataclass(frozen=True)
class Instruction:
    """What is asked for. `colour` and `shape` name the object, or describe the new one."""

    verb: str
    colour: str  # "" where the shape alone names the object
    shape: str
    new_colour: str = ""  # "make" only
    size: str = ""  # "add" only; "" is any
    position: str = ""  # "add" only


@dataclass(frozen=True)
class Example:
    """A picture, an instruction, and one picture that fulfils it."""

    source: Scene
    text: str
    target: Scene


_COLOUR, _SHAPE = "|".join(scenes.COLOURS), "|".join(scenes.SHAPES)
_NAME = rf"the (?:({_COLOUR}) )?({_SHAPE})"
_MAKE = re.compile(rf"make {_NAME} ({_COLOUR})")
_REMOVE = re.compile(rf"remove {_NAME}")
_ADD = re.compile(rf"add an? (?:(large|small) )?({_COLOUR}) ({_SHAPE}) ({'|'.join(scenes.POSITIONS)})")


def parse_instruction(text: str) -> Instruction:
    """Read an instruction back. Raises ValueError where it is not in the grammar."""
    if match := _MAKE.fullmatch(text):
        return Instruction("make", match[1] or "", match[2], new_colour=match[3])
    if match := _REMOVE.fullmatch(text):
        return Instruction("remove", match[1] or "", match[2])
    if match := _ADD.fullmatch(text):
        return Instruction("add", match[2], match[3], size=match[1] or "", position=match[4])
    raise ValueError(f"not an instruction about coloured shapes: {text!r}")


def named(scene: Scene, instruction: Instruction) -> int:
    """Index of the object that an instruction names. Raises ValueError unless it is exactly one."""
    colours = (instruction.colour,) if instruction.colour else tuple(scenes.COLOURS)
    fits = [i for i, t in enumerate(scene.things) if t.shape == instruction.shape and t.colour in colours]
    if len(fits) != 1:
        raise ValueError(f"{instruction} names {len(fits)} objects of {scene.things}")
    return fits[0]


def held_out(verb: str, thing: Thing, detail: str = "") -> bool:
    """Whether training must not see this instruction; `detail` is the new colour or the position.

    It goes by the object's colour and shape, whether or not the words say the colour.
    """
    size = thing.size if verb == "add" else ""
    return scenes.left_out("edit:" + "|".join((verb, size, thing.colour, thing.shape, detail)))


def sample_example(rng: random.Random, verb: str | None = None, want_held_out: bool = False) -> Example:
    """An example of `verb` (random: any), either of an instruction that training sees or of one held out.

    For training neither picture shows a pair of objects that `scenes.pair_held_out` sets aside.
    """
    verb = verb or rng.choice(VERBS)
    while True:
        source = scenes.sample_scene(rng, rng.choice((1, 2)) if verb == "add" else None)
        example = {"make": _recolour, "remove": _remove, "add": _add}[verb](rng, replace(source, position=""))
        if example is None:
            continue
        text, target, is_held_out = example
        new_pair = len(target.things) > 1 and scenes.held_out(target.things, target.background)
        if is_held_out == want_held_out and (want_held_out or not new_pair):
            return Example(source, text, target)


def _name(rng: random.Random, scene: Scene, thing: Thing) -> str:
    """The object in words, by its shape alone in half of the cases where that is enough."""
    alone = sum(t.shape == thing.shape for t in scene.things) == 1
    return f"the {thing.shape}" if alone and rng.random() < 0.5 else f"the {thing.colour} {thing.shape}"


def _recolour(rng: random.Random, source: Scene) -> tuple[str, Scene, bool] | None:
    index = rng.randrange(len(source.things))
    old = source.things[index]
    taken = {t.colour for t in source.things if t.shape == old.shape}
    free = [c for c in scenes.free_colours(source.background) if c not in taken]
    if not free:
        return None
    new = replace(old, colour=rng.choice(free))
    things = (*source.things[:index], new, *source.things[index + 1 :])
    text = f"make {_name(rng, source, old)} {new.colour}"
    return text, replace(source, things=things), held_out("make", old, new.colour)


def _remove(rng: random.Random, source: Scene) -> tuple[str, Scene, bool] | None:
    index = rng.randrange(len(source.things))
    old = source.things[index]
    things = (*source.things[:index], *source.things[index + 1 :])
    return f"remove {_name(rng, source, old)}", replace(source, things=things), held_out("remove", old)


def _add(rng: random.Random, source: Scene) -> tuple[str, Scene, bool] | None:
    position = rng.choice(tuple(scenes.POSITIONS))
    size = rng.choices(("", "small", "large"), (0.5, 0.25, 0.25))[0]
    new = Thing(rng.choice(scenes.free_colours(source.background)), rng.choice(scenes.SHAPES), size)
    if any((t.colour, t.shape) == (new.colour, new.shape) for t in source.things):
        return None
    new = scenes.place(rng, new, position)
    # Room for the largest object of that size at that place, so that the words alone decide whether it fits.
    widest = replace(new, side=scenes.SIZES[size][1] + 2 * scenes.POSITION_JITTER)
    if not all(scenes.apart(widest, other) for other in source.things):
        return None
    target = replace(source, things=(*source.things, new))
    return f"add {scenes.say(new)} {position}", target, held_out("add", new, position)
