"""Data parallelism: replicas of a model behind one executor. A request stays with the replica that it began on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import replace

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.layout import ParallelLayout
from vllm_omni.diffusion.engine.background import in_background
from vllm_omni.diffusion.engine.mp_executor import MultiprocessExecutor
from vllm_omni.diffusion.model_loader.diffusers_loader import LoadProgress
from vllm_omni.diffusion.worker.messages import MemoryUse, WorkerCommand, WorkerResult

_ENDING_S = 3.0  # that replicas have to end if one did not start


class ReplicatedExecutor:
    """``layout.data`` replicas, each on ranks of its own. What befalls one leaves the others alone."""

    def __init__(
        self, od_config: OmniDiffusionConfig, layout: ParallelLayout, on_load_progress: LoadProgress | None = None
    ) -> None:
        self._place: dict[str, int] = {}  # of each request in progress
        closing = threading.Event()
        starts = [
            in_background(
                MultiprocessExecutor,
                od_config,
                layout,
                on_load_progress if replica == 0 else None,
                first_device=replica * layout.world_size,
                closing=closing,
            )
            for replica in range(layout.data)
        ]
        try:
            for start in wait(starts, return_when=FIRST_EXCEPTION).done:
                start.result()
            self.replicas = [start.result() for start in starts]
        except BaseException:
            closing.set()  # those that still load need not come to its end
            wait([in_background(_close, start) for start in starts], _ENDING_S)
            raise

    @property
    def is_alive(self) -> bool:
        return any(replica.is_alive for replica in self.replicas)

    @property
    def num_ready(self) -> int:
        return sum(replica.num_ready for replica in self.replicas)

    def execute(self, command: WorkerCommand) -> WorkerResult:
        """Each replica carries out its part of the command, all at the same time."""
        loads = [replica.num_in_flight for replica in self.replicas]
        for request in command.prepare:
            place = min(range(len(loads)), key=lambda place: (*self._hindrance(place), loads[place]))
            self._place[request.request_id] = place
            loads[place] += 1
        parts = [self._part(command, place) for place in range(len(self.replicas))]
        running = [replica.begin(part) for replica, part in zip(self.replicas, parts, strict=True) if not part.is_empty]
        result = WorkerResult() if command.only_releases else _merged([future.result() for future in running])
        for request_id in (*command.release, *result.finished, *result.errors):
            self._place.pop(request_id, None)
        return result

    def close(self) -> None:
        for closing in [in_background(replica.close) for replica in self.replicas]:
            closing.result()

    def _hindrance(self, place: int) -> tuple[bool, bool]:
        """A replica that has failed for good gets no request, nor does one that starts again while another is ready."""
        replica = self.replicas[place]
        return not replica.is_alive, not replica.num_ready

    def _part(self, command: WorkerCommand, place: int) -> WorkerCommand:
        def here(request_ids: Sequence[str]) -> tuple[str, ...]:
            return tuple(request_id for request_id in request_ids if self._place.get(request_id) == place)

        return replace(
            command,
            release=here(command.release),
            prepare=tuple(request for request in command.prepare if self._place[request.request_id] == place),
            decode=here(command.decode),
            step=here(command.step),
        )


def _close(start: Future[MultiprocessExecutor]) -> None:
    if start.exception() is None:
        start.result().close()


def _merged(results: Sequence[WorkerResult]) -> WorkerResult:
    merged = WorkerResult()
    for result in results:
        merged.finished |= result.finished
        merged.errors |= result.errors
        merged.previews |= result.previews
        merged.attention_backends = result.attention_backends or merged.attention_backends
        merged.accelerations = result.accelerations or merged.accelerations
    # A round lasts as long as that of the slowest replica, and the fullest one limits what may begin.
    merged.step_s = max((result.step_s for result in results if result.step_s is not None), default=None)
    measured = [result.memory for result in results if result.memory is not None]
    if measured:
        merged.memory = MemoryUse(
            peak_bytes=max(memory.peak_bytes for memory in measured),
            state_bytes={key: value for memory in measured for key, value in memory.state_bytes.items()},
            free_bytes=min(memory.free_bytes for memory in measured),
            peer_bytes=max(memory.peer_bytes for memory in measured),
        )
    return merged
