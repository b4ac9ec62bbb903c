"""The model guide, followed as an author outside of this tree would follow it."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion import registry
from vllm_omni.diffusion.registry import register_diffusion_model, resolve_diffusion_model, supported_pipelines
from vllm_omni.errors import GenerationError, InvalidRequestError, UnsupportedPipelineError, WeightsError

TRANSFORMER = """
import torch
from torch import nn

from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.layers.adalayernorm import AdaLayerNorm
from vllm_omni.diffusion.layers.linear import QKVParallelLinear, ReplicatedLinear
from vllm_omni.diffusion.layers.norm import RMSNorm
from vllm_omni.diffusion.layers.rope import RotaryEmbedding
from vllm_omni.logger import init_logger

logger = init_logger(__name__)


class ToyTransformer2DModel(nn.Module):
    _repeated_blocks = ["ToyBlock"]

    def __init__(self, *, od_config: OmniDiffusionConfig | None = None, hidden_size=8, num_heads=2, **kwargs):
        super().__init__()
        self.od_config = od_config
        self.parallel_config = od_config.parallel_config if od_config else None
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.to_qkv = QKVParallelLinear(hidden_size, self.head_dim, num_heads, bias=False)
        self.norm = RMSNorm(hidden_size)
        self.proj = ReplicatedLinear(hidden_size, 3)
        self.attn = Attention(
            num_heads=self.num_heads,
            head_size=self.head_dim,
            softmax_scale=1.0 / (self.head_dim**0.5),
            causal=False,
            num_kv_heads=self.num_heads,
        )

    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.to_qkv.heads(self.norm(hidden_states))
        out = self.attn(query, key, value, attn_metadata=AttentionMetadata(attn_mask=attention_mask))
        return self.proj(out.reshape(*hidden_states.shape[:2], -1))
"""

PIPELINE = """
import json
import os
from collections.abc import Iterable

import torch
from torch import nn

from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.model_loader.weights import AutoWeightsLoader
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs

from toy_model.toy_transformer import ToyTransformer2DModel


def get_toy_post_process_func(od_config: OmniDiffusionConfig):
    from diffusers.image_processor import VaeImageProcessor

    image_processor = VaeImageProcessor(vae_scale_factor=8)

    def post_process_func(images: torch.Tensor):
        return image_processor.postprocess(images, output_type="pil")

    return post_process_func


def get_toy_pre_process_func(od_config: OmniDiffusionConfig):
    def pre_process_func(request: OmniDiffusionRequest):
        for i, prompt in enumerate(request.prompts):
            multi_modal_data = prompt.get("multi_modal_data", {}) if not isinstance(prompt, str) else None
            raw_image = multi_modal_data.get("image", None) if multi_modal_data is not None else None
            if raw_image is not None:
                request.sampling_params.height = raw_image.height
                request.sampling_params.width = raw_image.width
        return request

    return pre_process_func


class ToyPipeline(nn.Module):
    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = ""):
        super().__init__()
        self.od_config = od_config
        self.parallel_config = od_config.parallel_config
        self.device = get_local_device()
        model = od_config.model
        assert os.path.exists(model)
        kwargs = get_transformer_config_kwargs(od_config.tf_model_config, ToyTransformer2DModel)
        self.transformer = ToyTransformer2DModel(od_config=od_config, **kwargs)
        self.weights_sources = [
            DiffusersPipelineLoader.ComponentSource(
                model_or_path=od_config.model,
                subfolder="transformer",
                revision=None,
                prefix="transformer.",
                fall_back_to_pt=True,
            )
        ]

    def forward(self, req: OmniDiffusionRequest) -> DiffusionOutput:
        prompt = [p if isinstance(p, str) else (p.get("prompt") or "") for p in req.prompts]
        if prompt == ["fail"]:
            raise RuntimeError("the toy was told to fail")
        sampling_params = req.sampling_params
        steps = sampling_params.num_inference_steps or 3
        height, width = sampling_params.height or 16, sampling_params.width or 16
        generator = torch.Generator(self.device).manual_seed(sampling_params.seed)
        x = torch.randn(1, height * width, 8, generator=generator)
        for _ in range(steps):
            x = x + torch.nn.functional.pad(self.transformer(x), (0, 5))
        images = x[..., :3].tanh().transpose(1, 2).reshape(1, 3, height, width)
        return DiffusionOutput(output=images)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loader = AutoWeightsLoader(self)
        return loader.load_weights(weights)
"""

INIT = """
from .pipeline_toy import ToyPipeline, get_toy_post_process_func
from .toy_transformer import ToyTransformer2DModel

__all__ = ["ToyPipeline", "ToyTransformer2DModel", "get_toy_post_process_func"]
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package with the toy model on the import path, and a checkpoint for it."""
    package = tmp_path / "packages" / "toy_model"
    package.mkdir(parents=True)
    files = {"__init__.py": INIT, "toy_transformer.py": TRANSFORMER, "pipeline_toy.py": PIPELINE}
    for name, text in files.items():
        (package / name).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(package.parent))
    saved = [dict(table) for table in _tables()]
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "transformer").mkdir(parents=True)
    (checkpoint / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
    (checkpoint / "transformer" / "config.json").write_text(json.dumps({"hidden_size": 8, "num_heads": 2}))
    generator = torch.Generator().manual_seed(0)
    shapes = {"to_q.weight": (8, 8), "to_k.weight": (8, 8), "to_v.weight": (8, 8), "proj.weight": (3, 8)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(
        weights | {"norm.weight": torch.ones(8), "proj.bias": torch.zeros(3)},
        checkpoint / "transformer" / "model.safetensors",
    )
    yield checkpoint
    for table, content in zip(_tables(), saved, strict=True):
        table.clear()
        table.update(content)
    for name in [name for name in sys.modules if name.startswith("toy_model")]:
        del sys.modules[name]


def _tables():
    return (
        registry._DIFFUSION_MODELS,
        registry._DIFFUSION_PRE_PROCESS_FUNCS,
        registry._DIFFUSION_POST_PROCESS_FUNCS,
    )


def register_toy():
    register_diffusion_model(
        "ToyPipeline",
        "toy_model.pipeline_toy:ToyPipeline",
        pre_process_func="get_toy_pre_process_func",
        post_process_func="get_toy_post_process_func",
    )


def test_a_pipeline_with_only_forward_is_served(toy):
    register_toy()
    with Omni(str(toy)) as omni:
        first, again = (omni.generate("hello", OmniDiffusionSamplingParams(seed=1))[0] for _ in range(2))
        other = omni.generate("hello", OmniDiffusionSamplingParams(seed=2, height=8, width=24))[0]
    assert isinstance(first.images[0], Image.Image)
    assert first.images[0].size == (16, 16)
    assert first.images[0].tobytes() == again.images[0].tobytes()
    assert other.images[0].size == (24, 8)
    assert first.receipt.attention_backends == ("TORCH_SDPA",)


def test_the_pre_process_function_sees_the_request_first(toy):
    register_toy()
    prompt = {"prompt": "edit", "multi_modal_data": {"image": Image.new("RGB", (20, 12))}}
    with Omni(str(toy)) as omni:
        assert omni.generate(prompt)[0].images[0].size == (20, 12)


def test_a_failure_of_one_request_leaves_the_others_and_the_engine(toy):
    register_toy()
    with Omni(str(toy)) as omni:
        with pytest.raises(GenerationError, match="told to fail") as caught:
            omni.generate(["one", "fail", "two"])
        outputs = caught.value.outputs
        assert [output.finish_reason for output in outputs] == ["completed", "failed", "completed"]
        assert len(outputs[2].images) == 1
        assert omni.generate("again")[0].finished


def test_an_output_type_that_the_function_cannot_make_is_refused(toy):
    register_toy()
    with Omni(str(toy)) as omni, pytest.raises(InvalidRequestError, match="use 'pil' or 'pt'"):
        omni.generate("hello", OmniDiffusionSamplingParams(output_type="np"))


def test_an_unregistered_class_is_refused_with_what_there_is(toy):
    with pytest.raises(UnsupportedPipelineError, match=r"ToyPipeline.*QwenImagePipeline.*adding_a_model"):
        Omni(str(toy))


def test_an_entry_point_registers_a_model(toy, monkeypatch):
    class Entry:
        name, group = "toy", "vllm_omni.diffusion_models"

        def load(self):
            return register_toy

    class Broken(Entry):
        name = "broken"

        def load(self):
            raise ImportError("no such module")

    monkeypatch.setattr(registry, "entry_points", lambda group: [Broken(), Entry()])
    registry._load_entry_points.cache_clear()
    try:
        assert "ToyPipeline" in supported_pipelines()
        assert resolve_diffusion_model("ToyPipeline").pipeline_class.__name__ == "ToyPipeline"
    finally:
        registry._load_entry_points.cache_clear()


def test_missing_unexpected_and_misshapen_weights_are_listed(toy):
    register_toy()
    file = toy / "transformer" / "model.safetensors"
    complete = {"to_q.weight": torch.ones(8, 8), "to_k.weight": torch.ones(8, 8), "to_v.weight": torch.ones(8, 8)}
    complete |= {"norm.weight": torch.ones(8), "proj.weight": torch.ones(3, 8), "proj.bias": torch.ones(3)}
    save_file({name: value for name, value in complete.items() if name != "to_k.weight"}, file)
    with pytest.raises(WeightsError, match=r"lacks weights.*transformer\.to_qkv\.weight"):
        Omni(str(toy))
    save_file(complete | {"extra.weight": torch.ones(1)}, file)
    with pytest.raises(WeightsError, match=r"does not have: transformer\.extra\.weight"):
        Omni(str(toy))
    save_file(complete | {"proj.bias": torch.ones(4)}, file)
    with pytest.raises(WeightsError, match=r"wrong shape: transformer\.proj\.bias: shape \[4\] does not fit \[3\]"):
        Omni(str(toy))


def test_pickled_weights_load_as_plain_tensors_only(toy):
    register_toy()
    folder = toy / "transformer"
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "model.bin")
    with Omni(str(toy)) as omni:
        assert omni.generate("hello")[0].finished
    torch.save({"proj.bias": Evil()}, folder / "model.bin")
    with pytest.raises(WeightsError, match="more than plain tensors"):
        Omni(str(toy))


class Evil:
    def __reduce__(self):
        return (print, ("executed while loading",))
