"""FLUX.1 text to image: the same latents and pixels as diffusers' pipeline, alone and in any company."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity import BF16_TOLERANCE, assert_same_latents, assert_same_pictures, generators, relative_difference
from tests.tiny_flux import flux
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.engine.configure import configure
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.models.flux import FluxPipeline, FluxTransformer2DModel
from vllm_omni.diffusion.models.flux.flux_transformer import joint_rope
from vllm_omni.diffusion.registry import resolve_diffusion_model
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import InvalidRequestError, WeightsError

PROMPT = "a red circle left of a small blue square"
LONG_PROMPT = "a cat holding a sign that says hello zebra, with stripes {and} a hat"


@pytest.fixture(scope="module")
def dev_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux(tmp_path_factory.mktemp("flux") / "dev")


@pytest.fixture(scope="module")
def schnell_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux(tmp_path_factory.mktemp("flux") / "schnell", guidance_embeds=False)


@pytest.fixture(scope="module")
def omni(dev_folder: Path):
    with Omni(str(dev_folder), device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def schnell(schnell_folder: Path):
    with Omni(str(schnell_folder), device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(dev_folder: Path) -> Any:
    return load_reference(dev_folder)


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    pipeline = diffusers.FluxPipeline.from_pretrained(folder).to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def params(**values: Any) -> OmniDiffusionSamplingParams:
    return OmniDiffusionSamplingParams(
        **{"height": 64, "width": 64, "num_inference_steps": 3, "seed": 7, "output_type": "latent"} | values
    )


def ours(engine: Omni, prompt: Any, **values: Any) -> torch.Tensor:
    return torch.stack(list(engine.generate(prompt, params(**values))[0].images))


def theirs(pipeline: Any, prompt: str | None = PROMPT, **values: Any) -> torch.Tensor:
    seed = values.pop("seed", 7)
    count = values.get("num_images_per_prompt", 1)
    arguments = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"} | values
    return pipeline(prompt, generator=generators(*range(seed, seed + count)), **arguments).images


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    assert first.shape == second.shape
    return float((first.float() - second.float()).abs().max())


@pytest.mark.parametrize("size", [(64, 64), (64, 112), (96, 32)])
@pytest.mark.parametrize("true_cfg_scale", [None, 3.0])
def test_latents_are_those_of_diffusers(omni, reference, size, true_cfg_scale) -> None:
    height, width = size
    prompt: dict[str, Any] = {"prompt": PROMPT}
    extra: dict[str, Any] = {"guidance_scale": 4.0}
    guided: dict[str, Any] = {}
    if true_cfg_scale is not None:
        prompt["negative_prompt"] = guided["negative_prompt"] = "blurry"
        extra["true_cfg_scale"] = true_cfg_scale
    result = ours(omni, prompt, height=height, width=width, **extra)
    expected = theirs(reference, height=height, width=width, **extra, **guided)
    assert_same_latents(result, expected)


@pytest.mark.parametrize("true_cfg_scale", [1.0, 2.5])
def test_pixels_are_those_of_diffusers(omni, reference, true_cfg_scale) -> None:
    prompt = {"prompt": LONG_PROMPT, "negative_prompt": ""}
    values = {"height": 48, "width": 80, "true_cfg_scale": true_cfg_scale}
    picture = omni.generate(prompt, params(output_type="pil", **values))[0].images[0]
    expected = theirs(reference, LONG_PROMPT, negative_prompt="", output_type="pil", **values)[0]
    assert picture.size == (80, 48)
    assert_same_pictures([picture], [expected])


def test_a_model_without_guidance_input_has_a_constant_shift_and_matches_diffusers(schnell, schnell_folder) -> None:
    assert_same_latents(ours(schnell, PROMPT), theirs(load_reference(schnell_folder)))


def test_output_i_uses_seed_plus_i(omni, reference) -> None:
    result = ours(omni, PROMPT, num_outputs_per_prompt=2)
    assert_same_latents(result, theirs(reference, num_images_per_prompt=2))
    assert_same_latents(result[1:], ours(omni, PROMPT, seed=8))


def test_prompts_of_different_length_share_a_batch_and_match_diffusers(omni, reference) -> None:
    prompts = ["a cat", LONG_PROMPT]
    outputs = omni.generate(prompts, params())
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_same_latents(output.images[0][None], theirs(reference, prompt))


def test_a_prompt_longer_than_clip_reads_is_cut_for_clip_alone_as_in_diffusers(omni, reference) -> None:
    prompt = " ".join(["zebra crossing"] * 20)
    assert len(reference.tokenizer(prompt).input_ids) > 77
    assert_same_latents(ours(omni, prompt), theirs(reference, prompt))


def test_max_sequence_length_is_the_number_of_text_tokens(omni, reference) -> None:
    result = ours(omni, PROMPT, max_sequence_length=32)
    assert_same_latents(result, theirs(reference, max_sequence_length=32))
    assert difference(result, ours(omni, PROMPT)) > 1e-3


def test_given_sigmas_go_through_the_shift(omni, reference) -> None:
    sigmas = [1.0, 0.7, 0.2, 0.1]
    result = ours(omni, PROMPT, sigmas=sigmas, num_inference_steps=None)
    assert_same_latents(result, theirs(reference, sigmas=sigmas, num_inference_steps=4))


def test_given_latents_are_the_initial_noise(omni, reference) -> None:
    latents = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))
    result = ours(omni, PROMPT, latents=latents, num_outputs_per_prompt=2)
    assert_same_latents(result, theirs(reference, latents=latents, num_images_per_prompt=2))


def test_given_embeddings_take_the_place_of_the_text_encoders(omni, reference) -> None:
    embeds, pooled, _ = reference.encode_prompt(PROMPT, max_sequence_length=64)
    negative, negative_pooled, _ = reference.encode_prompt("blurry", max_sequence_length=64)
    prompt = {
        "prompt_embeds": embeds[0],
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": negative,
        "negative_pooled_prompt_embeds": negative_pooled[0],
    }
    result = ours(omni, prompt, true_cfg_scale=2.0)
    expected = theirs(
        reference,
        None,
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=negative_pooled,
        true_cfg_scale=2.0,
    )
    assert_same_latents(result, expected)


def test_bfloat16_is_close_to_diffusers_in_bfloat16(dev_folder) -> None:
    with Omni(str(dev_folder), device="cpu", dtype="bfloat16") as engine:
        result = ours(engine, PROMPT)
    expected = theirs(load_reference(dev_folder, torch.bfloat16)).float()
    assert relative_difference(result, expected) < BF16_TOLERANCE


def test_requests_in_a_mixed_batch_give_what_they_give_alone(omni) -> None:
    requests: list[tuple[Any, dict[str, Any]]] = [
        ("a cat", {"num_inference_steps": 2, "seed": 1, "guidance_scale": 0.0}),
        ({"prompt": LONG_PROMPT, "negative_prompt": "blue"}, {"num_inference_steps": 4, "true_cfg_scale": 4.0}),
        (PROMPT, {"seed": 3, "num_outputs_per_prompt": 3, "guidance_scale": 9.0}),
        (PROMPT, {"height": 32, "max_sequence_length": 48}),
    ]
    together = omni.generate([prompt for prompt, _ in requests], [params(**values) for _, values in requests])
    for (prompt, values), output in zip(requests, together, strict=True):
        assert difference(torch.stack(output.images), ours(omni, prompt, **values)) < 1e-5


def test_the_output_depends_on_both_text_encoders_and_on_the_guidance_scale(omni, reference) -> None:
    embeds, pooled, _ = reference.encode_prompt(PROMPT, max_sequence_length=32)
    base = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    result = ours(omni, base)
    assert difference(result, ours(omni, base | {"prompt_embeds": embeds.roll(1, -1)})) > 1e-3
    assert difference(result, ours(omni, base | {"pooled_prompt_embeds": pooled.roll(1, -1)})) > 1e-3
    assert difference(result, ours(omni, base, guidance_scale=1.0)) > 1e-3


def test_forward_runs_a_request_without_an_engine(dev_folder, omni) -> None:
    od_config = config(dev_folder)
    pipeline = DiffusersPipelineLoader(od_config).load_model(FluxPipeline)
    resolved = params(max_sequence_length=512, guidance_scale=3.5, true_cfg_scale=1.0, num_outputs_per_prompt=1)
    pixels = pipeline.forward(OmniDiffusionRequest(prompts=[{"prompt": PROMPT}], sampling_params=resolved)).output
    expected = omni.generate(PROMPT, params(output_type="pt"))[0].images[0]
    assert_same_latents((pixels[0] * 0.5 + 0.5).clamp(0, 1), expected)


def test_defaults_are_28_steps_for_the_guidance_distilled_model_and_4_without_guidance(dev_folder, schnell_folder):
    defaults = FluxPipeline.request_spec(config(dev_folder)).defaults
    assert (defaults["height"], defaults["width"], defaults["num_inference_steps"]) == (1024, 1024, 28)
    assert (defaults["guidance_scale"], defaults["true_cfg_scale"], defaults["max_sequence_length"]) == (3.5, 1.0, 512)
    defaults = FluxPipeline.request_spec(config(schnell_folder)).defaults
    assert defaults["num_inference_steps"] == 4
    assert "guidance_scale" not in defaults


def test_the_rotary_angles_are_those_of_diffusers_at_large_positions() -> None:
    rows, columns, axes_dims = 100, 120, (16, 56, 56)
    cos, sin = joint_rope(((0, rows, columns), (1, 3, 5)), 7, axes_dims, torch.device("cpu"))
    prepare_ids = diffusers.FluxPipeline._prepare_latent_image_ids
    picture, other = (prepare_ids(1, *size, "cpu", torch.float32) for size in ((rows, columns), (3, 5)))
    other[:, 0] = 1
    embed = diffusers.models.transformers.transformer_flux.FluxPosEmbed(10000, list(axes_dims))
    expected_cos, expected_sin = embed(torch.cat([torch.zeros(7, 3), picture, other]))
    # diffusers repeats each angle for both features of a pair
    assert difference(cos, expected_cos[:, ::2]) < 1e-5
    assert difference(sin, expected_sin[:, ::2]) < 1e-5


def test_clip_weights_load_under_the_names_of_the_published_checkpoints(dev_folder, tmp_path, omni) -> None:
    folder = copied(dev_folder, tmp_path)
    path = folder / "text_encoder" / "model.safetensors"
    renamed = {f"text_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    with Omni(str(folder), device="cpu") as engine:
        assert torch.equal(ours(engine, PROMPT), ours(omni, PROMPT))


def test_a_missing_part_of_a_fused_projection_is_an_error_that_names_it(dev_folder, tmp_path) -> None:
    folder = copied(dev_folder, tmp_path)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["single_transformer_blocks.1.proj_mlp.weight"]
    save_file(weights, path)
    with pytest.raises(WeightsError, match=r"single_transformer_blocks\.1\.to_qkv_mlp\.weight"):
        Omni(str(folder), device="cpu")


def test_random_weights_without_tokenizers_run_on_embeddings(dev_folder, tmp_path) -> None:
    folder = copied(dev_folder, tmp_path)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / name)
    prompt = {"prompt_embeds": torch.ones(5, 32), "pooled_prompt_embeds": torch.ones(32)}
    with Omni(str(folder), device="cpu", load_format="dummy") as engine:
        assert bool(torch.isfinite(ours(engine, prompt)).all())
        with pytest.raises(InvalidRequestError, match="give prompt_embeds and pooled_prompt_embeds instead"):
            ours(engine, PROMPT)


EMBEDS, POOLED = torch.zeros(4, 32), torch.zeros(32)


@pytest.mark.parametrize(
    ("prompt", "values", "param"),
    [
        (PROMPT, {"height": 72}, "height"),
        (PROMPT, {"max_sequence_length": 513}, "max_sequence_length"),
        (PROMPT, {"latents": torch.zeros(1, 15, 16)}, "latents"),
        (PROMPT, {"num_frames": 5}, "num_frames"),
        (PROMPT, {"extra_args": {"auto_resize": True}}, "extra_args.auto_resize"),
        (PROMPT, {"true_cfg_scale": 2.0}, "negative_prompt"),
        ({"prompt": PROMPT, "negative_prompt": "blue"}, {}, "negative_prompt"),
        ({"prompt": PROMPT, "multi_modal_data": {"image": None}}, {}, "multi_modal_data"),
        ({"prompt_embeds": EMBEDS}, {}, "pooled_prompt_embeds"),
        ({"prompt": PROMPT, "pooled_prompt_embeds": POOLED}, {}, "prompt_embeds"),
        ({"prompt_embeds": EMBEDS, "pooled_prompt_embeds": torch.zeros(31)}, {}, "pooled_prompt_embeds"),
        ({"prompt_embeds": EMBEDS, "pooled_prompt_embeds": torch.zeros(2, 32)}, {}, "pooled_prompt_embeds"),
        ({"prompt_embeds": torch.zeros(4, 8), "pooled_prompt_embeds": POOLED}, {}, "prompt_embeds"),
        (
            {"prompt_embeds": EMBEDS, "pooled_prompt_embeds": POOLED},
            {"max_sequence_length": 3},
            "prompt_embeds",
        ),
    ],
)
def test_what_the_model_cannot_honour_is_refused_at_the_door(omni, prompt, values, param) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        omni.generate(prompt, params(**values))
    assert caught.value.param == param


def test_a_model_without_guidance_input_refuses_a_guidance_scale(schnell) -> None:
    with pytest.raises(InvalidRequestError, match="guidance_scale=3"):
        schnell.generate(PROMPT, params(guidance_scale=3.0))


def test_a_negative_prompt_at_an_explicit_scale_of_one_is_off(omni) -> None:
    result = ours(omni, {"prompt": PROMPT, "negative_prompt": "blue"}, true_cfg_scale=1.0)
    assert torch.equal(result, ours(omni, PROMPT))


def test_a_prompt_of_too_many_tokens_is_refused_by_name(omni) -> None:
    with pytest.raises(InvalidRequestError, match="max_sequence_length is 4") as caught:
        omni.generate({"prompt": "a", "negative_prompt": PROMPT}, params(max_sequence_length=4, true_cfg_scale=2.0))
    assert caught.value.param == "negative_prompt"


def test_a_half_precision_activation_out_of_range_is_clipped() -> None:
    kwargs = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    model = FluxTransformer2DModel(**kwargs, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    model = model.half()
    torch.nn.init.constant_(model.single_transformer_blocks[0].proj_out.bias, 60000.0)
    torch.nn.init.constant_(model.single_transformer_blocks[0].norm.linear.bias, 60.0)
    block = model.single_transformer_blocks[0]
    rope = joint_rope(((0, 1, 2),), 1, (4, 6, 6), torch.device("cpu"))
    output = block(torch.ones(1, 3, 32).half(), torch.ones(1, 32).half(), rope)
    assert bool(torch.isfinite(output).all())


def test_both_pipelines_are_registered() -> None:
    assert resolve_diffusion_model("FluxPipeline").get_pre_process_func is None
    assert resolve_diffusion_model("FluxKontextPipeline").get_pre_process_func is not None


def config(folder: Path) -> OmniDiffusionConfig:
    return configure(str(folder), {"device": "cpu"})


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target / "model")
    return target / "model"
