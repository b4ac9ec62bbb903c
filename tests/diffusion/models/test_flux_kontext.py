"""FLUX.1 Kontext: the same latents and pixels as diffusers' pipeline, and a picture that is checked at the door."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image

from tests.parity import BF16_TOLERANCE, assert_same_latents, assert_same_pictures, generators, relative_difference
from tests.tiny_flux import flux_kontext
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.denoise import denoise_step
from vllm_omni.diffusion.engine.admission import admit
from vllm_omni.diffusion.engine.configure import configure
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.models.flux import FluxKontextPipeline, get_flux_kontext_pre_process_func
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.errors import InvalidRequestError

PROMPT = "a small blue square on a yellow background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux_kontext(tmp_path_factory.mktemp("kontext") / "model")


@pytest.fixture(scope="module")
def od_config(folder: Path) -> OmniDiffusionConfig:
    return configure(str(folder), {"device": "cpu"})


@pytest.fixture(scope="module")
def omni(folder: Path):
    with Omni(str(folder), device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return load_reference(folder)


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    pipeline = diffusers.FluxKontextPipeline.from_pretrained(folder).to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(width: int = 48, height: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def edit(image: Any, prompt: str = PROMPT, **more: Any) -> Any:
    return {"prompt": prompt, "multi_modal_data": {"image": image}, **more}


def params(*, auto_resize: Any = False, **values: Any) -> OmniDiffusionSamplingParams:
    defaults = {"height": 64, "width": 64, "num_inference_steps": 3, "seed": 7, "output_type": "latent"}
    return OmniDiffusionSamplingParams(extra_args={"auto_resize": auto_resize}, **defaults | values)


def ours(engine: Omni, prompt: Any, **values: Any) -> torch.Tensor:
    return torch.stack(list(engine.generate(prompt, params(**values))[0].images))


def theirs(pipeline: Any, image: Image.Image, **values: Any) -> Any:
    """diffusers changes the size to ``max_area`` pixels and the picture to a trained size unless told otherwise."""
    count = values.get("num_images_per_prompt", 1)
    arguments = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent", "_auto_resize": False}
    arguments |= values
    area = arguments["height"] * arguments["width"]
    return pipeline(image, PROMPT, generator=generators(*range(7, 7 + count)), max_area=area, **arguments).images


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    assert first.shape == second.shape
    return float((first.float() - second.float()).abs().max())


@pytest.mark.parametrize("size", [(64, 64), (64, 112)])
@pytest.mark.parametrize("picture_size", [(64, 64), (55, 99)])
@pytest.mark.parametrize("true_cfg_scale", [None, 3.0])
def test_latents_are_those_of_diffusers(omni, reference, size, picture_size, true_cfg_scale) -> None:
    height, width = size
    image = picture(*picture_size)
    guided: dict[str, Any] = {} if true_cfg_scale is None else {"negative_prompt": "blurry"}
    scale: dict[str, Any] = {} if true_cfg_scale is None else {"true_cfg_scale": true_cfg_scale}
    result = ours(omni, edit(image, **guided), height=height, width=width, **scale)
    expected = theirs(reference, image, height=height, width=width, **guided, **scale)
    assert_same_latents(result, expected)


def test_pixels_are_those_of_diffusers(omni, reference) -> None:
    image = picture()
    result = omni.generate(edit(image), params(height=48, width=80, output_type="pil"))[0].images[0]
    expected = theirs(reference, image, height=48, width=80, output_type="pil")[0]
    assert result.size == (80, 48)
    assert_same_pictures([result], [expected])


def test_a_picture_that_is_resized_is_told_in_the_log(od_config, caplog) -> None:
    with caplog.at_level("INFO", logger="vllm_omni"):
        for auto_resize in (True, False):
            request = admitted(od_config, edit(picture(30, 90)), params(auto_resize=auto_resize))
            assert "multi_modal_data" not in request.prompt, "a file that is read is not kept"
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"a picture of 30 x 90 pixels is brought to {size}" for size in ("672 x 1568", "16 x 80")]


def test_a_picture_takes_a_trained_size_as_in_diffusers(omni, reference) -> None:
    image = picture(30, 90)
    result = ours(omni, edit(image), auto_resize=True, num_inference_steps=1)
    expected = theirs(reference, image, _auto_resize=True, num_inference_steps=1)
    assert_same_latents(result, expected)


def test_outputs_of_a_request_share_the_picture_and_use_seed_plus_i(omni, reference) -> None:
    image = picture()
    result = ours(omni, edit(image), num_outputs_per_prompt=2)
    assert_same_latents(result, theirs(reference, image, num_images_per_prompt=2))


def test_bfloat16_is_close_to_diffusers_in_bfloat16(folder) -> None:
    image = picture()
    with Omni(str(folder), device="cpu", dtype="bfloat16") as engine:
        result = ours(engine, edit(image))
    expected = theirs(load_reference(folder, torch.bfloat16), image).float()
    assert relative_difference(result, expected) < BF16_TOLERANCE


def test_requests_in_a_mixed_batch_give_what_they_give_alone(omni) -> None:
    requests: list[tuple[Any, dict[str, Any]]] = [
        (edit(picture(), "a cat"), {"num_inference_steps": 2, "seed": 1, "guidance_scale": 2.5}),
        (edit(picture(seed=1), negative_prompt="blue"), {"true_cfg_scale": 4.0}),
        (edit(picture(seed=2)), {"seed": 3, "num_outputs_per_prompt": 2}),
        (edit(picture(80, 32)), {"height": 32}),
        # As many tokens as the first, in another shape: they may not share positions.
        (edit(picture(64, 48)), {}),
    ]
    together = omni.generate([prompt for prompt, _ in requests], [params(**values) for _, values in requests])
    for (prompt, values), output in zip(requests, together, strict=True):
        assert difference(torch.stack(output.images), ours(omni, prompt, **values)) < 1e-5


def test_the_picture_is_encoded_once_for_all_outputs_branches_and_steps(od_config, monkeypatch) -> None:
    pipeline: Any = DiffusersPipelineLoader(od_config).load_model(FluxKontextPipeline)
    calls: list[torch.Size] = []
    encode = pipeline.vae.encode
    monkeypatch.setattr(pipeline.vae, "encode", lambda pixels: (calls.append(pixels.shape), encode(pixels))[1])
    prompt = edit(picture(), negative_prompt="blue")
    request = admitted(od_config, prompt, params(num_outputs_per_prompt=2, true_cfg_scale=2.0))
    with torch.inference_mode():
        state = pipeline.prepare(request)
        while not state.is_done:
            denoise_step([state], pipeline)
    assert calls == [torch.Size([1, 3, 64, 48])]


def test_the_output_depends_on_the_picture(omni) -> None:
    assert difference(ours(omni, edit(picture())), ours(omni, edit(picture(seed=1)))) > 1e-3


def test_any_aspect_ratio_takes_the_size_that_diffusers_takes(od_config, reference) -> None:
    for width, height in [(16, 16), (31, 500), (500, 31), (40, 60), (64, 48), (123, 77), (160, 90)]:
        extra = admitted(od_config, edit(picture(width, height)), params(auto_resize=True)).extra
        rounded = (width // 16 * 16) / (height // 16 * 16)
        _, *size = min((abs(rounded - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        assert list(extra["image"].shape[-2:]) == size[::-1]


def test_bytes_a_data_url_and_an_array_give_what_the_picture_gives(od_config) -> None:
    image = picture()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    expected = admitted(od_config, edit(image), params()).extra["image"]
    for form in ([image], buffer.getvalue(), url, np.asarray(image), image.convert("RGBA")):
        assert torch.equal(admitted(od_config, edit(form), params()).extra["image"], expected)


@pytest.mark.parametrize(
    ("prompt", "values", "param"),
    [
        (PROMPT, {}, "image"),
        ({"prompt": PROMPT, "multi_modal_data": {}}, {}, "image"),
        (edit(None), {}, "image"),
        (edit([]), {}, "image"),
        (edit([picture(), picture()]), {}, "image"),
        (edit(b"\x89PNG broken"), {}, "image"),
        (edit("/etc/passwd"), {}, "image"),
        (edit("https://example.com/cat.png"), {}, "image"),
        (edit(7), {}, "image"),
        (edit(picture(15, 64)), {}, "image"),
        ({"prompt": PROMPT, "multi_modal_data": {"image": picture(), "audio": b""}}, {}, "multi_modal_data"),
        (edit(picture()), {"auto_resize": "no"}, "extra_args.auto_resize"),
        (edit(picture()), {"height": 40}, "height"),
        (edit(picture(), negative_prompt="blue"), {}, "negative_prompt"),
    ],
)
def test_what_the_model_cannot_honour_is_refused_at_the_door(omni, prompt, values, param) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        omni.generate(prompt, params(**values))
    assert caught.value.param == param


def admitted(od_config: OmniDiffusionConfig, prompt: Any, values: OmniDiffusionSamplingParams) -> OmniDiffusionRequest:
    """A request as it reaches the pipeline."""
    request = admit(prompt, values, FluxKontextPipeline.request_spec(od_config), {})
    return get_flux_kontext_pre_process_func(od_config)(request)
