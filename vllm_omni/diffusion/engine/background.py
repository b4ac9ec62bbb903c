"""Calls on threads of their own: an interrupt, which reaches the main thread alone, cuts none of them in two."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def in_background(function: Callable[..., T], *args: Any, **kwargs: Any) -> Future[T]:
    """The result to come of ``function``, on a thread that neither an interrupt nor the interpreter's end waits for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:  # of any kind: it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name=getattr(function, "__name__", None), daemon=True).start()
    return future


def call_at_times(method: Callable[[], object], interval_s: float, end: threading.Event) -> None:
    """Call ``method`` every so often, until ``end`` is set or its object is gone, which this does not keep."""
    reference = weakref.WeakMethod(method)

    def run() -> None:
        while not end.wait(interval_s):
            bound = reference()
            if bound is None:
                return
            bound()
            del bound

    in_background(run)


class Turns:
    """Calls in the background, one after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done = threading.Event()  # of the last call
        self._done.set()

    def begin(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Call ``function`` once the calls before it are done."""
        before, done = self._done, threading.Event()

        def turn() -> T:
            before.wait()
            try:
                # Should an interrupt have kept two calls from knowing of each other.
                with self._lock:
                    return function(*args)
            finally:
                done.set()

        future = in_background(turn)
        self._done = done
        return future

    def wait(self, seconds: float) -> None:
        """Wait for the last call, no longer than this."""
        self._done.wait(seconds)
