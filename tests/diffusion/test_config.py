from __future__ import annotations

import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file

from vllm_omni import Omni
from vllm_omni.diffusion.data import OmniDiffusionConfig, engine_options
from vllm_omni.diffusion.engine.configure import configure
from vllm_omni.diffusion.model_loader import utils
from vllm_omni.diffusion.model_loader.diffusers_loader import _least_bytes
from vllm_omni.diffusion.model_loader.weights import iterate_weights
from vllm_omni.errors import (
    AttentionBackendError,
    FeatureNotAvailableError,
    HubUnreachableError,
    InsufficientMemoryError,
    InvalidConfigError,
    InvalidModelFolderError,
    ModelNotFoundError,
    UnsupportedPipelineError,
    WeightsError,
)

PLANNED = {
    "enable_cpu_offload": True,
}


@pytest.fixture
def broken(qwen_folder, tmp_path):
    """A copy of the tiny checkpoint, to be damaged."""
    return shutil.copytree(qwen_folder, tmp_path / "broken")


@pytest.mark.parametrize(("option", "value"), PLANNED.items())
def test_an_option_whose_feature_does_not_exist_yet_is_refused_by_name(qwen_folder, option, value):
    with pytest.raises(FeatureNotAvailableError, match=option) as caught:
        Omni(str(qwen_folder), **{option: value})
    assert isinstance(caught.value, NotImplementedError)


def test_a_planned_option_at_its_default_is_fine(qwen_folder):
    assert configure(str(qwen_folder), {"quantization": None}).quantization is None


def test_an_unknown_option_is_refused_with_the_nearest_name(qwen_folder):
    with pytest.raises(InvalidConfigError, match=r"'vae_use_tilling'; did you mean 'vae_use_tiling'\?"):
        Omni(str(qwen_folder), vae_use_tilling=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dtype", "int8"),
        ("dtype", torch.int8),
        ("device", "tpu"),
        ("device", "cuda:99"),
        ("load_format", "gguf"),
        ("attention_backend", "SAGE"),
        ("vae_use_tiling", 1),
        ("max_batch_size", 0),
        ("max_num_seqs", "many"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_name(qwen_folder, option, value):
    with pytest.raises(InvalidConfigError, match=option) as caught:
        Omni(str(qwen_folder), **{option: value})
    assert caught.value.option == option


@pytest.mark.parametrize(
    ("option", "value", "needed"),
    [
        ("compile_cache_dir", "compiled", "enforce_eager=False"),
        ("prompt_embed_cache_size", 3, "enable_prompt_embed_cache=True"),
    ],
)
def test_an_option_that_another_one_leaves_without_effect_is_refused(qwen_folder, option, value, needed):
    with pytest.raises(InvalidConfigError, match=f"{option}={value!r} has no effect without {needed}") as caught:
        Omni(str(qwen_folder), **{option: value})
    assert caught.value.option == option


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "CUDNN_ATTN"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="these backends run on a GPU")
def test_an_attention_backend_that_cannot_run_is_an_error_and_no_fallback(qwen_folder, monkeypatch, backend):
    with pytest.raises(AttentionBackendError, match=rf"{backend} cannot run here.*Usable: TORCH_SDPA"):
        Omni(str(qwen_folder), attention_backend=backend)
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", backend)
    with pytest.raises(AttentionBackendError, match=backend):
        Omni(str(qwen_folder))


def test_the_option_wins_over_the_environment(qwen_folder, monkeypatch):
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "FLASH_ATTN")
    assert configure(str(qwen_folder), {"attention_backend": "TORCH_SDPA"}).attention_backend == "TORCH_SDPA"


def test_a_configuration_never_changes(qwen_folder):
    config = configure(str(qwen_folder), {})
    with pytest.raises(AttributeError):
        config.dtype = "float16"
    assert isinstance(config, OmniDiffusionConfig)
    assert set(engine_options()) >= {"dtype", "vae_use_tiling", "tensor_parallel_size", "cache_backend"}


def test_a_folder_that_is_missing_or_a_file_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        Omni(str(tmp_path / "nowhere"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(InvalidModelFolderError, match="is a file"):
        Omni(str(file))
    with pytest.raises(InvalidModelFolderError, match=r"model_index\.json is missing"):
        Omni(tmp_path)  # a path is as good as a string
    with pytest.raises(ModelNotFoundError, match="model='' is empty"):
        Omni("")
    with pytest.raises(InvalidModelFolderError, match="must be the path"):
        Omni(3)


def test_a_broken_or_foreign_model_index_is_refused(broken):
    index = broken / "model_index.json"
    index.write_text("{")
    with pytest.raises(InvalidModelFolderError, match="not valid JSON"):
        Omni(str(broken))
    index.unlink()
    index.mkdir()
    with pytest.raises(InvalidModelFolderError, match="cannot be read: Is a directory"):
        Omni(broken)
    index.rmdir()
    index.write_text("{}")
    with pytest.raises(InvalidModelFolderError, match="_class_name"):
        Omni(str(broken))
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(
        UnsupportedPipelineError, match=r"StableDiffusionPipeline.*registered: .*QwenImagePipeline.*adding_a_model\.md"
    ):
        Omni(str(broken))


def test_a_hub_id_without_a_network_says_so(monkeypatch):
    with pytest.raises(
        HubUnreachableError, match=r"some-org/some-model.*cannot be reached.*the path of a local folder"
    ):
        Omni("some-org/some-model")
    with pytest.raises(ModelNotFoundError, match="check the spelling"):
        Omni("not a model id!")


def test_a_revision_goes_with_a_hub_id_only(qwen_folder):
    with pytest.raises(InvalidModelFolderError, match="revision='main' goes with a hub id"):
        Omni(str(qwen_folder), revision="main")


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_weights_that_are_cut_off_or_missing_are_refused(broken, component):
    (file,) = (broken / component).glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=component):
        Omni(str(broken))
    file.unlink()
    with pytest.raises(WeightsError, match=component):
        Omni(str(broken))


@pytest.mark.parametrize("header", [[1], {"a": 3}, {"a": {"dtype": "F32", "shape": [1]}}])
def test_a_header_that_is_not_one_of_safetensors_is_refused(broken, header):
    (file,) = (broken / "transformer").glob("*.safetensors")
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(WeightsError, match="is damaged: its header is not that of safetensors"):
        Omni(broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "'DDIMScheduler'; QwenImagePipeline runs with FlowMatchEulerDiscrete"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas, which is not supported"),
        ({"use_dynamic_shifting": True, "time_shift_type": "cubic"}, "time_shift_type='cubic' is not supported"),
        ({"shift": "3"}, "shift='3' must be a positive number"),
        ({"base_shift": None}, "base_shift=None must be a positive number"),
    ],
)
def test_a_scheduler_that_would_not_run_as_it_says_is_refused(broken, changes, message):
    file = broken / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(InvalidModelFolderError, match=message):
        Omni(broken)


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("transformer", {"num_layers": "two"}, "num_layers='two' must be int"),
        ("transformer", {"axes_dims_rope": [8, "a", 12]}, r"axes_dims_rope=\[8, 'a', 12\] must be Sequence\[int\]"),
        ("transformer", {"guidance_embeds": "no"}, "guidance_embeds='no' must be bool"),
        ("vae", {"base_dim": "x"}, "vae/config.json makes no AutoencoderKLQwenImage"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(broken, component, changes, message):
    file = broken / component / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(InvalidModelFolderError, match=message):
        Omni(broken)


def test_weights_stream_so_that_no_second_copy_of_the_model_is_in_memory(qwen_folder, monkeypatch):
    alive: list[weakref.ref] = []
    most = []

    def watched(files, device):
        for name, tensor in iterate_weights(files, device):
            alive[:] = [reference for reference in alive if reference() is not None] + [weakref.ref(tensor)]
            most.append(len(alive))
            yield name, tensor

    monkeypatch.setattr("vllm_omni.diffusion.model_loader.diffusers_loader.iterate_weights", watched)
    with Omni(qwen_folder):
        assert len(most) > 20
        # The one that is being loaded, and the one before it until its name is bound anew.
        assert max(most) <= 2


def test_a_shard_that_the_index_names_must_be_there(broken):
    (file,) = (broken / "transformer").glob("*.safetensors")
    index = {"weight_map": {"a": file.name, "b": "second.safetensors"}}
    (broken / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"lacks second\.safetensors"):
        Omni(str(broken))


@pytest.mark.parametrize("component", ["tokenizer", "scheduler"])
def test_a_component_that_is_missing_is_named(broken, component):
    shutil.rmtree(broken / component)
    with pytest.raises(InvalidModelFolderError, match=component):
        Omni(str(broken))


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(qwen_folder, monkeypatch):
    monkeypatch.setattr("vllm_omni.platforms.cpu.CpuPlatform.free_memory", lambda self: 1000)
    with pytest.raises(InsufficientMemoryError, match=r"GiB in float32.*GiB free; use a smaller dtype"):
        Omni(str(qwen_folder))


def test_files_that_are_not_loaded_and_what_fp8_saves_do_not_count(broken):
    (weights,) = (broken / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    index = {"weight_map": dict.fromkeys(tensors, weights.name)}
    (broken / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    options = {"device": "cpu", "dtype": "bfloat16"}
    before = _least_bytes(configure(str(broken), dict(options)))
    shutil.copy(weights, broken / "transformer" / "model.fp16.safetensors")
    assert _least_bytes(configure(str(broken), dict(options))) == before
    num_saved = sum(tensor.numel() for tensor in tensors.values() if tensor.dim() == 2)
    assert _least_bytes(configure(str(broken), {**options, "quantization": "fp8"})) == before - num_saved


def test_sampling_defaults_of_a_checkpoint_must_be_sound(broken):
    (broken / "sampling_defaults.json").write_text(json.dumps({"steps": 3}))
    with pytest.raises(InvalidModelFolderError, match=r"sampling_defaults\.json.*'steps'"):
        Omni(str(broken))
    (broken / "sampling_defaults.json").write_text(json.dumps({"negative_prompt": 3}))
    with pytest.raises(InvalidModelFolderError, match=r"sampling_defaults\.json.*negative_prompt must be a str"):
        Omni(str(broken))


def test_hub_errors_are_told_apart(monkeypatch):
    def offline(*_args, **_kwargs):
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(utils, "snapshot_download", offline)
    with pytest.raises(HubUnreachableError, match="name resolution failed"):
        utils.resolve_model_folder("org/name", None)
