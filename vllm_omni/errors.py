"""Every error that a user can meet, one type per cause.

Each message shows the value that came, what is allowed, and what to do. The types also inherit the built-in
exception that a Python user would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

import contextlib
import difflib
import traceback
from collections.abc import Iterable
from typing import Any


class OmniError(Exception):
    """Base of every error that this package raises on purpose. It can be pickled, attributes included."""

    def __reduce__(self) -> tuple[Any, ...]:
        return restored_error, (type(self), self.args, self.__dict__)


def restored_error(kind: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    """An error of another process, without ``kind(*args)``, for it may ask for more than its message."""
    builtin: Any = kind
    while builtin.__module__ != "builtins":  # whose memory layout it has: of two bases that may be either
        builtin = builtin.__base__
    error: BaseException = builtin.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class InvalidRequestError(OmniError, ValueError):
    """A prompt or a sampling parameter cannot be honoured. ``param`` names the field."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


class InvalidConfigError(OmniError, ValueError):
    """An engine option has a value that is not allowed. ``option`` names it."""

    def __init__(self, message: str, *, option: str) -> None:
        super().__init__(message)
        self.option = option


class FeatureNotAvailableError(OmniError, NotImplementedError):
    """An engine option asks for a feature that this version does not have."""


class ModelNotFoundError(OmniError, FileNotFoundError):
    """The model is neither a folder on this machine nor a repository that the hub knows."""


class InvalidModelFolderError(OmniError, ValueError):
    """The model's folder is not in the layout of a diffusers pipeline."""


class HubUnreachableError(OmniError, ConnectionError):
    """The model is named by a hub id, it is not in the local cache, and the hub cannot be reached."""


class UnsupportedPipelineError(OmniError, LookupError):
    """The pipeline class that ``model_index.json`` names is not registered, or what is registered is not there."""


class WeightsError(OmniError, RuntimeError):
    """Weight files are missing or damaged, or do not fit the model."""


class AttentionBackendError(OmniError, RuntimeError):
    """An attention backend was asked for by name and cannot run here."""


class InsufficientMemoryError(OmniError, MemoryError):
    """The model or a request does not fit into the memory of the device."""


class NonFiniteOutputError(OmniError, ArithmeticError):
    """Denoising ended in NaN or infinite latents, so there is no picture to show."""


class GenerationError(OmniError, RuntimeError):
    """At least one request failed while it ran. ``outputs`` holds the results of all, in order."""

    def __init__(self, message: str, *, outputs: list[Any]) -> None:
        super().__init__(message)
        self.outputs = outputs


class ComparisonError(OmniError, RuntimeError):
    """The engine that a comparison is made against cannot load the model, or its outputs cannot be compared."""


class RankFailureError(OmniError, RuntimeError):
    """A rank of the model died, hung or failed, and the requests in progress were lost with it. ``rank`` names it.

    ``summary`` is the message without ``detail``, which quotes another error and may tell of the machine. ``is_final``:
    the ranks are not started again.
    """

    def __init__(self, summary: str, *, rank: int, detail: str | None = None, is_final: bool = False) -> None:
        super().__init__(summary if detail is None else f"{summary}: {detail}")
        self.rank = rank
        self.summary = summary
        self.is_final = is_final


class EngineClosedError(OmniError, RuntimeError):
    """The engine was closed and takes no more requests."""


class EngineFailureError(OmniError, RuntimeError):
    """The workers failed as a whole, so that the requests in progress were lost. The engine goes on with later ones."""


class QueueFullError(OmniError, RuntimeError):
    """As many requests wait as may wait. In ``retry_after_s`` seconds some of them are expected to be done."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def release_frames(error: BaseException) -> None:
    """Let go what the calls hold that led to ``error`` and have returned: tensors, a model.

    The lines of its traceback remain, but not those of an error that was raised on purpose, and of what caused it: its
    message says all, and functions within functions hold what they refer to while a traceback tells of them.
    """
    seen: BaseException | None = error
    known: set[int] = set()
    while seen is not None and id(seen) not in known:  # an error may be raised from itself
        known.add(id(seen))
        if isinstance(error, OmniError):
            seen.__traceback__ = None
        traceback.clear_frames(seen.__traceback__)
        # The first frame of a traceback keeps those that called it.
        caller = None if seen.__traceback__ is None else seen.__traceback__.tb_frame.f_back
        with contextlib.suppress(RuntimeError):  # of a frame that has not returned, as then have none of its callers
            while caller is not None:
                caller.clear()
                caller = caller.f_back
        seen = seen.__cause__ or seen.__context__


# What is compared of a name: the comparison takes long for a long one, and no name of ours comes near.
_LONGEST_NAME = 100


def nearest_name(name: str, allowed: Iterable[str]) -> str:
    """A sentence that helps someone who mistyped ``name``: the nearest allowed name, or all of them."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name[:_LONGEST_NAME], allowed, n=1)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(allowed)}"
