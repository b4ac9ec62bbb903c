"""Requests that a server has accepted, and who watches them.

The engine's thread tells what happened, watchers read it in their event loops. A watcher that does not read costs a
bounded amount of memory: of progress that nobody read, the latest is kept.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Union

from vllm_omni.logger import init_logger
from vllm_omni.outputs import OmniRequestOutput, StepProgress

logger = init_logger(__name__)

RequestState = Literal["queued", "running", "completed", "aborted", "failed"]
RequestEvent = Union[StepProgress, OmniRequestOutput]

MAX_UNREAD_EVENTS = 16
NUM_FINISHED_KEPT = 1000


class Watcher:
    """One reader of the events of a request, in one event loop.

    ``previews`` are the steps to be shown, or a function of the step and the number of steps; ``progress=False``
    waits for the end alone, and wakes the event loop once.
    """

    def __init__(
        self, *, progress: bool = True, previews: Collection[int] | Callable[[int, int], bool] = frozenset()
    ) -> None:
        self.progress = progress
        self.loop = asyncio.get_running_loop()
        self._previews = previews
        self._shown_step: int | None = None  # the step that it asked last to be shown
        self._unread: deque[RequestEvent] = deque()
        self._arrived = asyncio.Event()

    def needs_preview(self, step: int, num_steps: int) -> bool:
        """Asked by the engine's thread before each step."""
        previews = self._previews
        is_needed = previews(step, num_steps) if callable(previews) else step in previews
        if is_needed:
            self._shown_step = step
        return is_needed

    def as_asked_for(self, event: RequestEvent) -> RequestEvent:
        """The event as this watcher is to get it: without a preview for which only others asked."""
        if isinstance(event, StepProgress) and event.preview is not None and event.step != self._shown_step:
            return dataclasses.replace(event, preview=None)
        return event

    def put(self, event: RequestEvent) -> None:
        """Called in the watcher's event loop."""
        if len(self._unread) >= MAX_UNREAD_EVENTS:
            self._unread.pop()
        self._unread.append(event)
        self._arrived.set()

    async def get(self) -> RequestEvent:
        while not self._unread:
            self._arrived.clear()
            await self._arrived.wait()
        return self._unread.popleft()

    async def events(self) -> AsyncIterator[RequestEvent]:
        """Up to and with the request's result."""
        while True:
            event = await self.get()
            yield event
            if isinstance(event, OmniRequestOutput):
                return


@dataclass(kw_only=True)
class LiveRequest:
    """What is known of a request without its outputs."""

    request_id: str
    kind: str  # what it is for, as in "image"
    prompt: str | None
    width: int | None
    height: int | None
    num_frames: int | None
    num_steps: int
    priority: int = 0
    created: float = field(default_factory=time.time)  # seconds since 1970
    state: RequestState = "queued"
    step: int = 0
    finished: float | None = None  # seconds since 1970
    error: BaseException | None = None
    watchers: list[Watcher] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return self.finished is not None


class LiveRequests:
    """All requests in progress, and the last finished ones. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[str, LiveRequest] = {}
        self._finished: OrderedDict[str, LiveRequest] = OrderedDict()

    def add(self, request: LiveRequest, watcher: Watcher | None) -> None:
        with self._lock:
            if watcher is not None:
                request.watchers.append(watcher)
            self._live[request.request_id] = request

    def find(self, request_id: str) -> LiveRequest | None:
        with self._lock:
            return self._live.get(request_id) or self._finished.get(request_id)

    def all(self) -> list[LiveRequest]:
        """In the order in which they came."""
        with self._lock:
            return sorted((*self._finished.values(), *self._live.values()), key=lambda request: request.created)

    @property
    def in_progress(self) -> list[LiveRequest]:
        with self._lock:
            return list(self._live.values())

    def watch(self, request_id: str, watcher: Watcher) -> bool:
        """False if the request is not in progress."""
        with self._lock:
            request = self._live.get(request_id)
            if request is None:
                return False
            request.watchers.append(watcher)
            return True

    def unwatch(self, request_id: str, watcher: Watcher) -> None:
        with self._lock:
            request = self._live.get(request_id)
            if request is not None and watcher in request.watchers:
                request.watchers.remove(watcher)

    def needs_preview(self, request_id: str, step: int, num_steps: int) -> bool:
        request = self._live.get(request_id)
        if request is None or step >= num_steps:
            return False
        # Each is asked, also behind one that needs it: a watcher gets the previews for which it asked itself.
        return bool([watcher for watcher in tuple(request.watchers) if watcher.needs_preview(step, num_steps)])

    def tell(self, events: Iterable[RequestEvent]) -> None:
        """Take in what happened and pass it on to the watchers: one call into each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Watcher, RequestEvent]]] = {}
        with self._lock:
            for event in events:
                request = self._live.get(event.request_id)
                if request is None:
                    continue
                is_final = isinstance(event, OmniRequestOutput)
                for watcher in request.watchers:
                    if is_final or watcher.progress:
                        by_loop.setdefault(watcher.loop, []).append((watcher, watcher.as_asked_for(event)))
                self._note(request, event)
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, deliveries)
            except RuntimeError:
                logger.debug("an event loop closed while its watchers waited")

    def _note(self, request: LiveRequest, event: RequestEvent) -> None:
        if isinstance(event, StepProgress):
            request.state, request.step = "running", event.step
            return
        request.state, request.finished = event.finish_reason, time.time()
        request.error = None if event.error is None else _without_traceback(event.error)
        request.watchers.clear()
        del self._live[request.request_id]
        self._finished[request.request_id] = request
        while len(self._finished) > NUM_FINISHED_KEPT:
            self._finished.popitem(last=False)


def _without_traceback(error: BaseException) -> BaseException:
    """A copy to keep: the frames of a traceback hold the tensors that were in use."""
    copy = type(error).__new__(type(error), *error.args)
    copy.__dict__.update(error.__dict__)
    return copy


def _put_all(deliveries: list[tuple[Watcher, Any]]) -> None:
    for watcher, event in deliveries:
        watcher.put(event)
