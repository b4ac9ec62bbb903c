"""Ranks as actors of a Ray cluster, so that one model spans machines. Ray places, starts and ends them, and no more.

What the engine and its ranks say to each other travels as on one machine, over a socket of their own.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from vllm_omni.diffusion.engine.rank_pool import ENDED, SEND_TIMEOUT_S, Rank, RankHandle, RankPool
from vllm_omni.diffusion.worker.channel import Channel
from vllm_omni.errors import FeatureNotAvailableError, RankFailureError, first_line

_PLACING_S = 60.0  # until the cluster must have room for the ranks
_CONNECTING_S = 120.0  # a process starts meanwhile, and imports torch
_TOKEN_BYTES = 32
_connecting = threading.Lock()  # replicas start side by side


def require_ray() -> Any:
    """The module ``ray``, connected to a cluster. Raises ``FeatureNotAvailableError`` if it is not installed.

    The cluster is that of ``RAY_ADDRESS`` or of this machine; if there is none, Ray starts one on this machine.
    """
    try:
        import ray
    except ImportError as error:
        raise FeatureNotAvailableError(
            "distributed_executor_backend='ray' needs the package ray: pip install 'vllm-omni[ray]'; or use 'mp', for"
            " ranks on this machine"
        ) from error
    with _connecting:
        if not ray.is_initialized():
            ray.init(log_to_driver=True)
    return ray


class RayRankPool(RankPool):
    """One actor per rank, each in its bundle of a placement group: a CPU, and on GPUs a GPU.

    Ranks on one machine have consecutive numbers, so that those that talk most, tensor parallelism before all, do so
    within it. A rank sees the GPU that Ray gave it and no other.
    """

    def _host(self) -> str:
        address: str = require_ray().util.get_node_ip_address()
        return address

    def _device(self, device: torch.device, number: int) -> str:
        return "cuda:0" if device.type == "cuda" else str(device)

    def _start(self, num_ranks: int, device: torch.device, handles: list[RankHandle]) -> Iterator[Rank]:
        ray = require_ray()
        bundle = {"CPU": 1, "GPU": 1} if device.type == "cuda" else {"CPU": 1}
        group = _placed(ray, num_ranks, bundle)
        token = secrets.token_bytes(_TOKEN_BYTES)
        with socket.create_server((self._host(), 0), backlog=num_ranks) as server:
            actor_class = ray.remote(max_restarts=0, num_cpus=1, num_gpus=bundle.get("GPU", 0))(_RankActor)
            port = server.getsockname()[1]
            for number, place in enumerate(_by_machine(ray, group, num_ranks)):
                strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, place)
                actor = actor_class.options(scheduling_strategy=strategy).remote(sys.path)
                handles.append(_RayProcess(ray, actor, group, (self._host(), port, number, token)))
            channels = _accept(server, num_ranks, token, handles)
        for number, handle in enumerate(handles):
            yield Rank(number=number, handle=handle, channel=channels[number])


class _RankActor:
    """What Ray runs: the process of a rank."""

    def __init__(self, driver_path: list[str]) -> None:
        # Where the machine has them, modules that this engine can import can be imported by its ranks.
        sys.path.extend(path for path in driver_path if path not in sys.path)

    def pid(self) -> int:
        return os.getpid()

    def serve(self, host: str, port: int, number: int, token: bytes) -> None:
        from vllm_omni.diffusion.worker.rank_process import serve

        end = socket.create_connection((host, port), timeout=SEND_TIMEOUT_S)
        end.settimeout(None)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.sendall(token + number.to_bytes(4, "big"))
        with contextlib.suppress(EOFError, OSError):  # the engine closed the channel, or is gone
            serve(Channel(end))


class _RayProcess:
    """The actor of a rank."""

    def __init__(self, ray: Any, actor: Any, group: Any, arguments: tuple[Any, ...]) -> None:
        self._ray, self._actor, self._group = ray, actor, group
        self.pid: int = ray.get(actor.pid.remote())
        self._end = actor.serve.remote(*arguments)

    def why_gone(self) -> str | None:
        if not self._ray.is_initialized() or not self._ray.wait([self._end], timeout=0)[0]:
            return None
        try:
            self._ray.get(self._end)
        except Exception as error:  # of any kind: what the actor raised, or Ray's word that it died
            return f"ended: {type(error).__name__}: {first_line(error)}"
        return ENDED

    def wait(self, seconds: float) -> None:
        if self._ray.is_initialized():
            self._ray.wait([self._end], timeout=max(seconds, 0.001))

    def kill(self) -> None:
        if not self._ray.is_initialized():
            return  # with the connection Ray has ended the actors
        self._ray.kill(self._actor)
        self._ray.util.remove_placement_group(self._group)


def _placed(ray: Any, num_ranks: int, bundle: dict[str, int]) -> Any:
    """A placement group with room for the ranks, on few machines. Raises ``RankFailureError`` if there is none."""
    group = ray.util.placement_group([bundle] * num_ranks, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=_PLACING_S)
    except ray.exceptions.GetTimeoutError:
        ray.util.remove_placement_group(group)
        free = {name: ray.available_resources().get(name, 0) for name in bundle}
        raise RankFailureError(
            f"the Ray cluster has had no room for {num_ranks} ranks of {bundle} for {_PLACING_S:g} s; free are {free}:"
            " add machines, end other jobs, or lower a size",
            rank=0,
        ) from None
    return group


def _by_machine(ray: Any, group: Any, num_ranks: int) -> list[int]:
    """The bundles, those of one machine one after the other."""
    machines = ray.util.placement_group_table(group)["bundles_to_node_id"]
    order = list(dict.fromkeys(machines[place] for place in range(num_ranks)))
    return sorted(range(num_ranks), key=lambda place: order.index(machines[place]))


def _accept(server: socket.socket, num_ranks: int, token: bytes, handles: list[RankHandle]) -> dict[int, Channel]:
    """The ranks' ends by number. Whoever does not know the token is hung up on, before anything of his is read."""
    channels: dict[int, Channel] = {}
    server.settimeout(1.0)
    deadline = time.monotonic() + _CONNECTING_S
    while len(channels) < num_ranks:
        for number, handle in enumerate(handles):
            gone = handle.why_gone()
            if gone is not None or time.monotonic() > deadline:
                cause = gone or f"did not connect within {_CONNECTING_S:g} s"
                raise RankFailureError(f"rank {number} of {num_ranks} {cause}", rank=number)
        try:
            end, _ = server.accept()
        except TimeoutError:
            continue
        end.settimeout(SEND_TIMEOUT_S)
        said = b""
        with contextlib.suppress(OSError):
            said = end.recv(_TOKEN_BYTES + 4, socket.MSG_WAITALL)
        if not hmac.compare_digest(said[:_TOKEN_BYTES], token):
            end.close()
            continue
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        channels[int.from_bytes(said[_TOKEN_BYTES:], "big")] = Channel(end)
    return channels
