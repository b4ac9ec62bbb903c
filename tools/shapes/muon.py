"""Muon (Jordan et al., 2024): momentum whose singular values are set to about one, for matrices and kernels.

Like shapes are stacked and stepped at once: a small model has hundreds of small matrices, and on a GPU the
launches would cost more than the arithmetic. Adam needs several times as many steps on these models.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Steps matrices [out, in] and convolution kernels, taken as matrices [out, in x area].

    Of a 3-D kernel only the last time slice moves, the only one that one frame meets. A step has the size
    `lr * 0.2 * sqrt(max(out, in))` with `match_adam` (Liu et al., 2025), so that AdamW's rates carry over, or
    `lr * sqrt(max(1, out / in))`.
    """

    def __init__(
        self, parameters: list[Tensor], lr: float | Tensor, match_adam: bool, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.95, "weight_decay": weight_decay})
        self.match_adam = match_adam
        self.shapes: dict[torch.Size, list[Tensor]] = {}
        for p in self.param_groups[0]["params"]:
            self.shapes.setdefault(p.shape, []).append(p)

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        for shape, alike in self.shapes.items():
            # The text half of the last block has no gradient: nothing reads what it makes.
            parameters = [p for p in alike if p.grad is not None]
            last = len(shape) == 5
            targets = [p[:, :, -1] if last else p for p in parameters]
            gradient = torch.stack([p.grad[:, :, -1] if last else p.grad for p in parameters]).flatten(2)
            state = self.state[parameters[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"]
            momentum.lerp_(gradient, 1 - group["momentum"])
            step = orthogonal(gradient.lerp(momentum, group["momentum"]))
            rows, columns = step.shape[1:]
            size = 0.2 * max(rows, columns) ** 0.5 if self.match_adam else max(1, rows / columns) ** 0.5
            torch._foreach_mul_(targets, 1 - group["lr"] * group["weight_decay"])
            step = step * (-size * group["lr"])
            torch._foreach_add_(targets, [change.view_as(target) for change, target in zip(step, targets, strict=True)])


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearest half-orthogonal matrices of [N, a, b], roughly, by five Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-8)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
