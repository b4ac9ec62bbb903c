"""A training step as a CUDA graph: launching its many small kernels one by one takes longer than they run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def captured(step: Callable[[], Tensor], num_warmups: int = 3) -> Callable[[], Tensor]:
    """Record `step`, which returns its loss, and give back what replays it. Warming up does steps as well.

    No step may have run before: the nodes that add up gradients remember their stream, which must be the recorded one.

    The step must not wait for the device, must leave no gradients behind, and reads what changes between two steps,
    such as learning rates, from tensors.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(num_warmups):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss.clone()

    return replay
