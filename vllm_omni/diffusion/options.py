"""How an option of the engine is declared: its default, and what the command line and its check need to know."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help_text: str, **extra: Any) -> Any:
    """A field of a dataclass of options.

    ``extra``: ``choices``; ``parse``, which reads the text of a command; ``needs``, another option and the value that
    it must have for this one to have an effect.
    """
    return field(default=default, metadata={"help": help_text, **extra})


def planned(default: Any, feature: str, **extra: Any) -> Any:
    """An option whose feature is not there yet: any other value than the default is refused by name."""
    return field(default=default, metadata={"help": f"{feature} (not available yet)", "planned": feature, **extra})
