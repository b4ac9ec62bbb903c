"""Pipelines whose transformer cannot be split as its plan says, which only a forward shows."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from vllm_omni.diffusion.attention.layer import Attention, AttentionMetadata
from vllm_omni.diffusion.distributed.sequence_parallel import SequenceParallelInput
from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image import (
    QwenImagePipeline,
    get_qwen_image_post_process_func,
)

get_misplanned_post_process_func = get_qwen_image_post_process_func


class WrongDims(QwenImagePipeline):
    changes: ClassVar[dict[str, Any]] = {
        "img_in": {0: SequenceParallelInput(split_dim=1, expected_dims=4, split_output=True)}
    }

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        kind = type(self.transformer)
        plan = {**kind._sp_plan, **self.changes}
        self.transformer.__class__ = type(kind.__name__, (kind,), {"_sp_plan": plan})


class NoSuchDimension(WrongDims):
    changes: ClassVar[dict[str, Any]] = {"img_in": {0: SequenceParallelInput(split_dim=3, split_output=True)}}


class UnsplitPositions(WrongDims):
    """Positions stay those of the whole sequence."""

    changes: ClassVar[dict[str, Any]] = {"pos_embed": {}}


class NoStart(QwenImagePipeline):
    def __init__(self, **kwargs):
        raise ArithmeticError("this model cannot be built")


class MaskOfPairs(QwenImagePipeline):
    """Its attention masks pairs of tokens."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for layer in self.transformer.modules():
            if isinstance(layer, Attention):
                layer.register_forward_pre_hook(_with_mask_of_pairs, with_kwargs=True)


def _with_mask_of_pairs(layer, args, kwargs):
    query, key, value = args[:3]
    mask = torch.ones(query.shape[0], 1, query.shape[1], key.shape[1], dtype=torch.bool)
    return (query, key, value), {"attn_metadata": AttentionMetadata(attn_mask=mask)}
