"""What the engine does before its first request, so that this one is not the slowest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_omni.diffusion.options import option
from vllm_omni.errors import InvalidConfigError

# Width, height and, of a video, number of frames; None is the model's own.
WarmupSize = tuple[int | None, int | None, int | None]


def _comma_separated(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """What is done at the start."""

    warmup_sizes: Sequence[str] | None = option(
        None,
        "sizes to run before the first request: WIDTHxHEIGHT, of a video WIDTHxHEIGHTxFRAMES, or default, the model's"
        " own; several with commas, or an empty text for none; absent: default in a server that compiles, else none",
        parse=_comma_separated,
    )
    compile_cache_dir: str | None = option(
        None,
        "folder that keeps compiled code for later starts; absent: TORCHINDUCTOR_CACHE_DIR, else a temporary folder",
        needs=("enforce_eager", False),
    )

    def __post_init__(self) -> None:
        given: Any = self.warmup_sizes
        if isinstance(given, str) or (given is not None and not isinstance(given, Sequence)):
            raise InvalidConfigError(
                f"warmup_sizes={given!r} must be a list of sizes, as in ['1024x1024']", option="warmup_sizes"
            )
        object.__setattr__(self, "warmup_sizes", None if given is None else tuple(given))
        self.sizes()
        folder: Any = self.compile_cache_dir
        if folder is not None and (not isinstance(folder, str) or not folder):
            raise InvalidConfigError(
                f"compile_cache_dir={folder!r} must be the path of a folder", option="compile_cache_dir"
            )

    def sizes(self, default: Sequence[str] = ()) -> list[WarmupSize]:
        """The sizes to run; ``default`` if none are given. Raises ``InvalidConfigError`` for one that is no size."""
        return [_size(text) for text in (default if self.warmup_sizes is None else self.warmup_sizes)]


def _size(text: Any) -> WarmupSize:
    if text == "default":
        return None, None, None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:x([1-9]\d*))?", text) if isinstance(text, str) else None
    if match is None:
        raise InvalidConfigError(
            f"warmup_sizes: {text!r} must be WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, as in 1024x768 or 832x480x81, or"
            " default",
            option="warmup_sizes",
        )
    return int(match[1]), int(match[2]), None if match[3] is None else int(match[3])
