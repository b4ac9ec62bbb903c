"""Wan text to video against diffusers on tiny random checkpoints, float32 on the CPU.

``python -m pytest tests/diffusion/models/test_wan.py`` is the whole comparison.
"""

from __future__ import annotations

import json
import shutil

import av
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from tests import tiny_wan
from tests.parity import (
    BF16_TOLERANCE,
    assert_same_latents,
    assert_same_pictures,
    generators,
    relative_difference,
)
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.errors import InvalidModelFolderError, InvalidRequestError
from vllm_omni.media import write_video

SHORT, LONG = "a red circle", "a cat holding a sign  that says hello,\nleft of a small “blue” square &amp;amp; {braces}"
SIZES = [(32, 32), (32, 48), (64, 16)]
SMALL = {"height": 32, "width": 48, "num_frames": 5}
FORMS = {
    "wan2.2": lambda folder: tiny_wan.wan_t2v(folder),
    "wan2.1": lambda folder: tiny_wan.wan_t2v(folder, num_experts=1),
    "euler": lambda folder: tiny_wan.wan_t2v(folder, euler=True),
    "ti2v": lambda folder: tiny_wan.wan_ti2v(folder),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("wan")
    return {name: build(root / name) for name, build in FORMS.items()}


@pytest.fixture(scope="module")
def omnis(folders):
    opened = {name: Omni(str(folder)) for name, folder in folders.items()}
    yield opened
    for omni in opened.values():
        omni.close()


@pytest.fixture(scope="module")
def references(folders):
    return {name: load_reference(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def omni(omnis):
    return omnis["wan2.2"]


@pytest.fixture(scope="module")
def reference(references):
    return references["wan2.2"]


def load_reference(folder, dtype=torch.float32):
    pipeline = WanPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference_videos(pipeline, prompt, seeds=(7,), steps=4, output_type="latent", **arguments):
    return pipeline(
        prompt,
        generator=generators(*seeds),
        num_inference_steps=steps,
        num_videos_per_prompt=len(seeds),
        output_type=output_type,
        **arguments,
    ).frames


def params(seed=7, steps=4, output_type="latent", **values):
    return OmniDiffusionSamplingParams(seed=seed, num_inference_steps=steps, output_type=output_type, **values)


def stacked(output):
    return torch.stack(output.images)


def pipeline_of(omni):
    return omni._engine._executor._worker._runner.pipeline


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_latents_match_diffusers(omni, reference, height, width, guidance_scale):
    size = {"height": height, "width": width, "num_frames": 5, "guidance_scale": guidance_scale}
    expected = reference_videos(reference, SHORT, negative_prompt="blurry", **size)
    output = omni.generate({"prompt": SHORT, "negative_prompt": "blurry"}, params(**size))[0]
    assert_same_latents(stacked(output), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_frames", [1, 9])
def test_every_form_matches_diffusers(omnis, references, form, num_frames):
    size = {"height": 64, "width": 32, "num_frames": num_frames}
    expected = reference_videos(references[form], LONG, negative_prompt="dark and blurry", **size)
    output = omnis[form].generate({"prompt": LONG, "negative_prompt": "dark and blurry"}, params(**size))[0]
    assert_same_latents(stacked(output), expected)


def test_the_experts_change_in_the_middle_of_the_steps(omni, reference):
    request = omni._engine.validate(SHORT, params(guidance_scale=5.0, guidance_scale_2=2.0, **SMALL))
    state = pipeline_of(omni).prepare(request)
    experts = [conditions["expert"] for conditions in state.step_conditions]
    assert experts == ["transformer", "transformer", "transformer_2", "transformer_2"]
    assert state.guidance.scale.tolist() == [5.0, 5.0, 2.0, 2.0]
    scales = {"guidance_scale": 5.0, "guidance_scale_2": 2.0}
    output = omni.generate(SHORT, params(**scales, **SMALL))[0]
    assert_same_latents(stacked(output), reference_videos(reference, SHORT, **scales, **SMALL))
    assert output.receipt.guidance == "classifier-free, scale 5, then 2"
    one_scale = stacked(omni.generate(SHORT, params(guidance_scale=5.0, **SMALL))[0])
    assert relative_difference(stacked(output), one_scale) > 0.01


def test_a_prompt_without_negative_is_guided_away_from_the_empty_text(omni):
    absent = stacked(omni.generate(SHORT, params(**SMALL))[0])
    empty = stacked(omni.generate({"prompt": SHORT, "negative_prompt": ""}, params(**SMALL))[0])
    other = stacked(omni.generate({"prompt": SHORT, "negative_prompt": "dark"}, params(**SMALL))[0])
    assert torch.equal(absent, empty)
    assert relative_difference(absent, other) > 1e-3


def test_videos_match_diffusers(omni, reference):
    expected = reference_videos(reference, LONG, output_type="pil", **SMALL)
    output = omni.generate(LONG, params(output_type="pil", **SMALL))[0]
    assert len(output.images) == 1
    assert_same_pictures(output.images[0], expected[0])


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_arrays_and_tensors_match_diffusers(omnis, references, output_type):
    expected = reference_videos(references["ti2v"], SHORT, output_type=output_type, height=32, width=64, num_frames=5)
    size = {"height": 32, "width": 64, "num_frames": 5}
    video = omnis["ti2v"].generate(SHORT, params(output_type=output_type, **size))[0].images[0]
    assert video.shape == expected[0].shape
    assert abs(video - expected[0]).max() < 1e-4


def test_prompts_of_different_length_in_one_batch_match_diffusers(omni, reference):
    negatives = ["blurry", "dark and blurry"]
    expected = reference(
        [SHORT, LONG],
        negative_prompt=negatives,
        generator=generators(7, 7),
        num_inference_steps=4,
        output_type="latent",
        **SMALL,
    ).frames
    prompts = [
        {"prompt": prompt, "negative_prompt": negative}
        for prompt, negative in zip((SHORT, LONG), negatives, strict=True)
    ]
    outputs = omni.generate(prompts, params(**SMALL))
    assert_same_latents(torch.cat([stacked(output) for output in outputs]), expected)


def test_output_i_uses_seed_plus_i(omni, reference):
    expected = reference_videos(reference, SHORT, seeds=(7, 8), **SMALL)
    both = stacked(omni.generate(SHORT, params(num_outputs_per_prompt=2, **SMALL))[0])
    alone = stacked(omni.generate(SHORT, params(seed=8, **SMALL))[0])
    assert_same_latents(both, expected)
    assert_same_latents(both[1:], alone, 1e-5)


def test_given_latents_match_diffusers(omni, reference):
    latents = torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    expected = reference_videos(reference, SHORT, latents=latents.clone(), **SMALL)
    before = latents.clone()
    assert_same_latents(stacked(omni.generate(SHORT, params(latents=latents, **SMALL))[0]), expected)
    assert torch.equal(latents, before)


def test_given_embeddings_are_padded_as_encoded_ones_are(omni, reference):
    embeds = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))
    negative = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    padded = [torch.nn.functional.pad(given, (0, 0, 0, 512 - given.shape[1])) for given in (embeds, negative)]
    expected = reference_videos(reference, None, prompt_embeds=padded[0], negative_prompt_embeds=padded[1], **SMALL)
    for shape in ((1, -1, 32), (-1, 32)):
        prompt = {"prompt_embeds": embeds.view(shape), "negative_prompt_embeds": negative.view(shape)}
        assert_same_latents(stacked(omni.generate(prompt, params(**SMALL))[0]), expected)


def test_a_shorter_max_sequence_length_matches_diffusers(omni, reference):
    expected = reference_videos(reference, SHORT, max_sequence_length=64, **SMALL)
    assert_same_latents(stacked(omni.generate(SHORT, params(max_sequence_length=64, **SMALL))[0]), expected)


def test_bfloat16_matches_diffusers(folders):
    expected = reference_videos(load_reference(folders["wan2.2"], torch.bfloat16), SHORT, **SMALL)
    with Omni(str(folders["wan2.2"]), dtype="bfloat16") as omni:
        assert pipeline_of(omni).transformer.scale_shift_table.dtype == torch.float32
        output = omni.generate(SHORT, params(**SMALL))[0]
    assert relative_difference(stacked(output), expected) < BF16_TOLERANCE


MIXED = [
    (SHORT, {"seed": 1, "steps": 4, "guidance_scale": 5.0, "guidance_scale_2": 2.0}),
    (LONG, {"seed": 2, "steps": 9, "guidance_scale": 3.0}),
    ("dark", {"seed": 3, "steps": 6, "guidance_scale": 1.0}),
    (SHORT, {"seed": 4, "steps": 4, "num_outputs_per_prompt": 3}),
]


@pytest.mark.parametrize("form", ["wan2.2", "ti2v"])
@pytest.mark.parametrize("max_batch_size", [16, 2])
def test_a_mixed_batch_gives_what_its_requests_give_alone(omnis, form, max_batch_size):
    size = {"height": 32, "width": 64, "num_frames": 5}
    mixed = [
        (prompt, params(**{k: v for k, v in values.items() if form == "wan2.2" or k != "guidance_scale_2"}, **size))
        for prompt, values in MIXED
    ]
    together = omnis[form].generate(
        [prompt for prompt, _ in mixed], [values for _, values in mixed], max_batch_size=max_batch_size
    )
    for (prompt, values), output in zip(mixed, together, strict=True):
        alone = omnis[form].generate(prompt, values)[0]
        assert_same_latents(stacked(output), stacked(alone), 2e-5)


def test_requests_on_different_experts_take_forwards_of_their_own(omni, monkeypatch):
    pipeline, calls = pipeline_of(omni), []
    predict = pipeline.predict

    def recorded(latents, timestep, conditions):
        calls.append((conditions["expert"], len(timestep), timestep.tolist()))
        return predict(latents, timestep, conditions)

    monkeypatch.setattr(pipeline, "predict", recorded)
    values = [params(seed=seed, steps=steps, guidance_scale=1.0, **SMALL) for seed, steps in ((1, 4), (2, 8))]
    omni.generate([SHORT, LONG], values)
    # Of 4 steps 2 belong to the first expert, of 8 steps 3.
    assert [(expert, rows) for expert, rows, _ in calls][:4] == [
        ("transformer", 2),
        ("transformer", 2),
        ("transformer_2", 1),
        ("transformer", 1),
    ]
    boundary = 875
    for expert, _, timesteps in calls:
        assert all((timestep >= boundary) == (expert == "transformer") for timestep in timesteps)


def test_prompts_are_encoded_once_for_all_outputs(omni, monkeypatch):
    encoder, calls = pipeline_of(omni).text_encoder, []
    forward = encoder.forward

    def recorded(*arguments, **options):
        calls.append(options["input_ids"].shape)
        return forward(*arguments, **options)

    monkeypatch.setattr(encoder, "forward", recorded)
    omni.generate(SHORT, params(num_outputs_per_prompt=3, **SMALL))
    assert len(calls) == 2  # the prompt and the empty negative one


def test_a_video_is_written_and_read_back(omni, tmp_path):
    output = omni.generate(SHORT, params(output_type="np", num_outputs_per_prompt=2, fps=12, **SMALL))[0]
    assert len(output.images) == 2
    assert (output.receipt.num_frames, output.receipt.fps) == (5, 12)
    path = tmp_path / "video.mp4"
    write_video(output.images[1], path, output.receipt.fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert (stream.codec_context.name, stream.average_rate, len(frames)) == ("h264", 12, 5)
        assert (frames[0].width, frames[0].height) == (48, 32)


def test_tiled_decoding_matches_diffusers(folders, reference):
    size = {"height": 288, "width": 32, "num_frames": 5, "guidance_scale": 1.0}
    with Omni(str(folders["wan2.2"]), vae_use_tiling=True) as tiled:
        video = tiled.generate(SHORT, params(steps=1, output_type="pt", **size))[0].images[0]
    whole = reference_videos(reference, SHORT, steps=1, output_type="pt", **size)[0]
    reference.vae.enable_tiling()
    try:
        expected = reference_videos(reference, SHORT, steps=1, output_type="pt", **size)[0]
    finally:
        reference.vae.disable_tiling()
    assert abs(video - expected).max() < 1e-4
    assert abs(video - whole).max() > 1e-3, "the clip was decoded in one piece"


@pytest.mark.parametrize(("num_frames", "nearest"), [(6, "5 and 9"), (8, "5 and 9"), (2, "1 and 5"), (80, "77 and 81")])
def test_a_frame_count_that_cannot_be_made_is_refused_with_the_nearest(omni, num_frames, nearest):
    with pytest.raises(InvalidRequestError, match=f"num_frames={num_frames} .*the nearest are {nearest}") as caught:
        omni.generate(SHORT, params(num_frames=num_frames))
    assert caught.value.param == "num_frames"


@pytest.mark.parametrize(
    ("form", "prompt", "values", "param"),
    [
        ("wan2.2", SHORT, {"height": 40}, "height"),
        ("ti2v", SHORT, {"height": 48}, "height"),
        ("wan2.2", SHORT, {"num_frames": 8193}, "num_frames"),
        ("wan2.2", SHORT, {"true_cfg_scale": 3.0}, "true_cfg_scale"),
        ("wan2.1", SHORT, {"guidance_scale_2": 3.0}, "guidance_scale_2"),
        ("wan2.2", SHORT, {"guidance_scale": 1.0, "guidance_scale_2": 3.0}, "guidance_scale_2"),
        ("wan2.2", SHORT, {"guidance_scale_2": -1.0}, "guidance_scale_2"),
        ("wan2.2", SHORT, {"max_sequence_length": 513}, "max_sequence_length"),
        ("wan2.2", SHORT, {"max_sequence_length": 3}, "prompt"),
        ("wan2.2", SHORT, {"latents": torch.zeros(1, 4, 2, 4, 5)}, "latents"),
        ("wan2.2", {"prompt_embeds": torch.zeros(4, 33)}, {}, "prompt_embeds"),
        ("wan2.2", {"prompt": SHORT, "negative_prompt_embeds": torch.zeros(513, 32)}, {}, "negative_prompt_embeds"),
        ("wan2.2", {"prompt": SHORT, "multi_modal_data": {"image": None}}, {}, "multi_modal_data"),
    ],
)
def test_what_the_model_cannot_honour_is_refused_by_name(omnis, form, prompt, values, param):
    with pytest.raises(InvalidRequestError) as caught:
        omnis[form].generate(prompt, params(**{**SMALL, **({"width": 64} if form == "ti2v" else {}), **values}))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"boundary_ratio": None}, "boundary_ratio=None and transformer_2"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "prediction_type='epsilon'"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "'DDIMScheduler' must be"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("transformer/config.json", {"qk_norm": "layer_norm"}, "qk_norm='layer_norm'"),
        ("transformer_2/config.json", {"pos_embed_seq_len": 514}, "pos_embed_seq_len=514"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(folders, tmp_path, file, changes, message):
    folder = shutil.copytree(folders["wan2.2"], tmp_path / "changed")
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InvalidModelFolderError, match=message):
        Omni(str(folder))


def test_a_norm_that_no_projection_uses_is_left_out(folders, tmp_path):
    folder = shutil.copytree(folders["wan2.1"], tmp_path / "with_norm")
    path = next((folder / "transformer").glob("*.safetensors"))
    save_file(load_file(path) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(64)}, path)
    with Omni(str(folder)) as omni:
        assert omni.generate(SHORT, params(**SMALL))[0].finished


def test_random_weights_of_full_size_run_without_weight_files(folders, tmp_path):
    folder = shutil.copytree(folders["wan2.2"], tmp_path / "dummy", ignore=shutil.ignore_patterns("*.safetensors"))
    with Omni(str(folder), load_format="dummy") as omni:
        assert torch.isfinite(stacked(omni.generate(SHORT, params(**SMALL))[0])).all()
