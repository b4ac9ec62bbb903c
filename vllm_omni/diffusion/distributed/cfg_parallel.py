"""CFG parallelism: the branches of a request are computed by different ranks, and every rank combines them.

A pipeline of three verbs has nothing to do for it: the denoising loop asks :func:`owned_outputs` which rows are this
rank's, and :func:`exchange` for those of the others. A pipeline that runs in one piece inherits
:class:`CFGParallelMixin`.

Shapes: N outputs of a request, ``...`` the latent dimensions.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_omni.diffusion.distributed.collectives import all_gather_flat
from vllm_omni.diffusion.distributed.groups import RankGroup, current_groups


def owner_of(request_id: str, row: int, num_rows: int, num_ranks: int) -> int:
    """The rank that computes row ``row`` of the ``num_rows`` of a request at every step: branch by branch, its outputs.

    It depends on nothing else, so that what a step cache remembers of a row stays on its rank. Requests whose rows do
    not divide begin at ranks of their own, or the first rank would get more of all of them.
    """
    first = 0 if num_rows % num_ranks == 0 else zlib.crc32(request_id.encode())
    return (row * num_ranks // num_rows + first) % num_ranks


def owned_outputs(request_id: str, branch: int, num_outputs: int, num_branches: int, group: RankGroup) -> range:
    """The outputs of one branch whose predictions this rank computes; they are consecutive."""
    num_rows = num_outputs * num_branches
    owned = [
        output
        for output in range(num_outputs)
        if owner_of(request_id, branch * num_outputs + output, num_rows, group.size) == group.rank
    ]
    return range(owned[0], owned[-1] + 1) if owned else range(0)


def exchange(
    owned: Mapping[Any, torch.Tensor],
    owners: Mapping[Any, int],
    shapes: Mapping[Any, Sequence[int]],
    group: RankGroup,
    device: torch.device,
) -> dict[Any, torch.Tensor]:
    """Every rank's tensors by key, from those that this rank has.

    ``owners`` and ``shapes`` list all keys in the same order on every rank. Tensors travel in float32.
    """
    numels = {key: math.prod(shape) for key, shape in shapes.items()}
    lengths = [sum(numels[key] for key, owner in owners.items() if owner == rank) for rank in range(group.size)]
    mine = [owned[key].reshape(-1).float() for key, owner in owners.items() if owner == group.rank]
    flat = torch.cat(mine) if mine else torch.empty(0, device=device)
    parts = all_gather_flat(flat, lengths, group)
    whole: dict[Any, torch.Tensor] = {}
    starts = [0] * group.size
    for key, owner in owners.items():
        start = starts[owner]
        whole[key] = parts[owner][start : start + numels[key]].view(*shapes[key])
        starts[owner] = start + numels[key]
    return whole


class CFGParallelMixin:
    """Classifier-free guidance of a pipeline that runs its own loop, with a branch on each rank.

    ``predict_noise`` is one call of ``self.transformer``; override it for a model that is called otherwise.
    """

    transformer: Any
    scheduler: Any

    def predict_noise(self, **kwargs: Any) -> torch.Tensor:
        """The prediction of one branch, ``[N, ...]``."""
        output = self.transformer(**kwargs)
        prediction: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return prediction

    def predict_noise_maybe_with_cfg(
        self,
        do_true_cfg: bool,
        true_cfg_scale: float,
        positive_kwargs: dict[str, Any],
        negative_kwargs: dict[str, Any] | None,
        cfg_normalize: bool = True,
        output_slice: int | None = None,
    ) -> torch.Tensor:
        """The guided prediction on every rank; that of the positive branch without ``do_true_cfg``.

        ``output_slice`` keeps as many tokens of each prediction, along its second dimension.
        """
        branches = [positive_kwargs]
        if do_true_cfg:
            if negative_kwargs is None:
                raise ValueError("do_true_cfg=True needs negative_kwargs")
            branches.append(negative_kwargs)
        group = current_groups().cfg
        if group.size == 1 or len(branches) == 1:
            predictions = [self._sliced(self.predict_noise(**kwargs), output_slice) for kwargs in branches]
        else:
            predictions = self._predict_with_ranks(branches, output_slice, group)
        if len(predictions) == 1:
            return predictions[0]
        return self.combine_cfg_noise(predictions[0], predictions[1], true_cfg_scale, cfg_normalize)

    def _predict_with_ranks(
        self, branches: Sequence[dict[str, Any]], output_slice: int | None, group: RankGroup
    ) -> list[torch.Tensor]:
        # A rank beyond the branches computes one that another has, rather than wait for its shape.
        mine = self._sliced(self.predict_noise(**branches[group.rank % len(branches)]), output_slice)
        parts = all_gather_flat(mine.reshape(-1), [mine.numel()] * group.size, group)
        return [parts[branch].view_as(mine) for branch in range(len(branches))]

    def combine_cfg_noise(
        self,
        noise_pred: torch.Tensor,
        neg_noise_pred: torch.Tensor,
        true_cfg_scale: float,
        cfg_normalize: bool = False,
    ) -> torch.Tensor:
        """Classifier-free guidance (arXiv:2207.12598), with the norm of the positive prediction if asked for."""
        combined = neg_noise_pred + true_cfg_scale * (noise_pred - neg_noise_pred)
        return self.cfg_normalize_function(noise_pred, combined) if cfg_normalize else combined

    def cfg_normalize_function(self, noise_pred: torch.Tensor, comb_pred: torch.Tensor) -> torch.Tensor:
        """``comb_pred`` with the norm that ``noise_pred`` has along the last dimension."""
        norm = torch.linalg.vector_norm(noise_pred, dim=-1, keepdim=True)
        return comb_pred * (norm / torch.linalg.vector_norm(comb_pred, dim=-1, keepdim=True))

    def scheduler_step(self, noise_pred: torch.Tensor, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents after the scheduler's step."""
        stepped: torch.Tensor = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]
        return stepped

    def scheduler_step_maybe_with_cfg(
        self, noise_pred: torch.Tensor, t: torch.Tensor, latents: torch.Tensor, do_true_cfg: bool
    ) -> torch.Tensor:
        """As :meth:`scheduler_step`: every rank has the same prediction and takes the step itself."""
        return self.scheduler_step(noise_pred, t, latents)

    @staticmethod
    def _sliced(prediction: torch.Tensor, output_slice: int | None) -> torch.Tensor:
        return prediction if output_slice is None else prediction[:, :output_slice]
