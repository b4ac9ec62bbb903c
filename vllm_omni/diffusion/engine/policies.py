"""Who is served next: an order over the requests in hand, made anew for each round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.diffusion.request import OmniDiffusionRequest

# A request may take so many times as long as it would alone before its size counts against it no more.
_PATIENCE = 4.0


@dataclass(kw_only=True)
class ScheduledRequest:
    """A request, how far it is, and what its place in the queue depends on. Times are ``time.monotonic()`` seconds.

    ``num_steps`` is 1 for a pipeline that runs in one piece; such requests share no step.
    """

    request: OmniDiffusionRequest
    num_steps: int
    num_rows: int = 1  # of each step: outputs times branches
    can_share: bool = True
    step: int = 0
    priority: int = 0  # the lower, the earlier
    deadline: float | None = None
    client: str = ""
    arrived: float = 0.0
    served_s: float = 0.0  # seconds of the rounds in which it took a step

    def __post_init__(self) -> None:
        params = self.request.sampling_params
        self.shape = (params.height, params.width, params.num_frames)
        self.volume = (params.height or 1) * (params.width or 1) * (params.num_frames or 1)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_steps_left(self) -> int:
        return self.num_steps - self.step


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What a policy may know when it ranks."""

    now: float
    step_seconds: Callable[[ScheduledRequest], float]  # of one request alone
    served_clients: Mapping[str, float]  # seconds by client


def rank(policy: str, scheduled: ScheduledRequest, moment: Moment) -> tuple[Any, ...]:
    """The place of a request: the least is served first.

    Priorities come before everything. Then come requests that meet their deadline only if they are served now, the
    earliest deadline first; then the policy decides.
    """
    remaining_s = scheduled.num_steps_left * moment.step_seconds(scheduled)
    deadline = scheduled.deadline
    is_urgent = deadline is not None and moment.now <= deadline <= moment.now + 2 * remaining_s
    return (
        scheduled.priority,
        deadline if is_urgent else float("inf"),
        *_POLICIES[policy](scheduled, moment, remaining_s),
        scheduled.arrived,
        scheduled.request_id,
    )


def _first_come(scheduled: ScheduledRequest, moment: Moment, remaining_s: float) -> tuple[float, ...]:
    return ()


def _fair(scheduled: ScheduledRequest, moment: Moment, remaining_s: float) -> tuple[float, ...]:
    """Whoever was served least, and of one's own requests the one that was."""
    return moment.served_clients[scheduled.client], scheduled.served_s


def _shortest(scheduled: ScheduledRequest, moment: Moment, remaining_s: float) -> tuple[float, ...]:
    """Shortest remaining work first, which keeps the mean latency least. So that nothing starves, a request that was
    slowed down beyond patience goes before those that were slowed down less (highest response ratio)."""
    alone_s = max(scheduled.num_steps * moment.step_seconds(scheduled), 1e-9)
    waited_s = moment.now - scheduled.arrived - scheduled.served_s
    return -max(1 + waited_s / alone_s, _PATIENCE), remaining_s


_POLICIES: dict[str, Callable[[ScheduledRequest, Moment, float], tuple[float, ...]]] = {
    "shortest": _shortest,
    "fair": _fair,
    "fcfs": _first_come,
}
