"""A training loop whose learning rates follow the wall clock, with an average of the weights.

A run ends decayed after the minutes that it was given, however fast the machine is.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tools.shapes.capture import captured

SAVE_EVERY_S = 60


class Loop:
    """Steps `optimizers` by the gradients of `loss`. Each of them has a tensor of `rates` as its learning rate.

    `schedule` gives the share of the peak rates for the share of the time used, 0..1, after a linear start of
    `num_warmup` steps. `average` follows `model` by `ema_decay`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[], Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        rates: Sequence[Tensor],
        peaks: Sequence[float],
        *,
        schedule: Callable[[float], float],
        ema_decay: float,
        num_warmup: int = 100,
    ) -> None:
        self.model, self.loss, self.optimizers = model, loss, optimizers
        self.rates, self.peaks, self.schedule = rates, peaks, schedule
        self.ema_decay, self.num_warmup = ema_decay, num_warmup
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.step = 0

    def run(self, minutes: float, batch_size: int, *, capture: bool, on_progress: Callable[[], None]) -> None:
        """Train for `minutes`, compiling and recording included. Prints loss and speed.

        `on_progress` is called every minute, to save.
        """
        start, losses = time.time(), []
        # The rates are still zero, so that the steps before the recording change no weight.
        update = captured(self.update) if self.rates[0].is_cuda and capture else self.update
        first = shown = saved = time.time()
        while (progress := (time.time() - start) / (60 * minutes)) < 1:
            losses.append(self._train_step(update, progress))
            if self.step % 100 == 0:
                # Reading the loss waits for the device, so that the clock is true.
                mean, now = float(torch.stack(losses).mean()), time.time()
                losses = []
                if now - shown > 10:
                    speed = self.step * batch_size / (now - first)
                    print(f"step {self.step} t {now - start:.0f}s loss {mean:.4f} {speed:.0f} samples/s", flush=True)
                    shown = now
                if now - saved > SAVE_EVERY_S:
                    on_progress()
                    saved = time.time()
        print(f"{self.step} steps of {batch_size} in {(time.time() - start) / 60:.1f} minutes", flush=True)

    def update(self) -> Tensor:
        """One step of the optimizers. Returns the loss."""
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _train_step(self, update: Callable[[], Tensor], progress: float) -> Tensor:
        share = min(1.0, (self.step + 1) / self.num_warmup) * self.schedule(progress)
        for rate, peak in zip(self.rates, self.peaks, strict=True):
            rate.fill_(peak * share)
        loss = update()
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        return loss
