"""A tensor-parallel rank reads its part of a weight file, and not the rest."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from vllm_omni.diffusion.distributed.groups import TensorParallelRank, tensor_parallel_rank
from vllm_omni.diffusion.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm_omni.diffusion.model_loader import diffusers_loader
from vllm_omni.diffusion.model_loader.diffusers_loader import ComponentSource, DiffusersPipelineLoader
from vllm_omni.diffusion.model_loader.weights import AutoWeightsLoader, iterate_weights

WIDE = 64  # features


class BytesRead(TorchDispatchMode):
    """Counts the bytes of ``mapped`` tensors that operators read; a view reads none."""

    def __init__(self):
        super().__init__()
        self.mapped, self.num_bytes = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            for x in tree_flatten(args)[0]:
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() in self.mapped:
                    self.num_bytes += x.numel() * x.element_size()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "make", "shapes"),
    [
        ("column", lambda tp: ColumnParallelLinear(WIDE, 32, bias=False, tp=tp), {"linear": (32, WIDE)}),
        ("row", lambda tp: RowParallelLinear(WIDE, 32, bias=False, tp=tp), {"linear": (32, WIDE)}),
        (
            "qkv",
            lambda tp: QKVParallelLinear(WIDE, 4, 4, 2, bias=False, tp=tp),
            {"to_q": (16, WIDE), "to_k": (8, WIDE), "to_v": (8, WIDE)},
        ),
    ],
)
@pytest.mark.parametrize("rank", range(4))
def test_a_rank_reads_its_part_of_the_file_alone(tmp_path, kind, make, shapes, rank):
    if kind == "qkv":
        rank, size = rank % 2, 2  # of its two key heads
    else:
        size = 4
    path = tmp_path / "weights.safetensors"
    save_file({f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}, path)
    parent = nn.Module()
    parent.linear = make(TensorParallelRank(rank, size))
    read = BytesRead()

    def watched():
        for name, tensor in iterate_weights([path]):
            read.mapped.add(tensor.untyped_storage().data_ptr())
            yield name, tensor

    with read:
        assert AutoWeightsLoader(parent).load_weights(watched()) == {"linear.weight"}
    assert (parent.linear.weight == 1).all()
    assert read.num_bytes == 32 * WIDE * 4 / size


@pytest.mark.parametrize(("size", "ahead"), [(1, "cuda"), (2, "cpu")])
def test_whole_files_are_read_ahead_for_a_gpu_only_where_a_rank_needs_all_of_them(tmp_path, monkeypatch, size, ahead):
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    devices = []
    monkeypatch.setattr(
        diffusers_loader, "iterate_weights", lambda files, device: devices.append(device.type) or iterate_weights(files)
    )
    config = SimpleNamespace(torch_device=torch.device("cuda"), parallel_config=SimpleNamespace(use_hsdp=False))
    with tensor_parallel_rank(TensorParallelRank(0, size)):
        names = [name for name, _ in DiffusersPipelineLoader(config)._stream([ComponentSource(str(tmp_path))])]
    assert (names, devices) == (["weight"], [ahead])
