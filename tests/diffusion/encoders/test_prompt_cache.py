"""The cache of prompt embeddings: what is encoded once, and that results are the same to the bit."""

from __future__ import annotations

import pytest
import torch

from tests import tiny_flux, tiny_qwen_edit, tiny_wan
from tests.tiny_qwen_edit import picture
from vllm_omni import Omni, OmniDiffusionSamplingParams
from vllm_omni.diffusion.encoders.prompt_cache import PromptEmbedCache, pictures_key
from vllm_omni.diffusion.models.qwen_image import pipeline_qwen_image_edit
from vllm_omni.diffusion.models.qwen_image.pipeline_qwen_image import QwenImagePipeline
from vllm_omni.errors import FeatureNotAvailableError, InvalidConfigError, InvalidRequestError


class Encoder:
    """Remembers for what it ran."""

    def __init__(self):
        self.keys = []

    def __call__(self, cache, key):
        def encode():
            self.keys.append(key)
            return torch.tensor([len(self.keys)])

        return cache.get(key, encode)


def test_an_equal_key_gives_the_very_tensor_of_the_first_time():
    cache, encoder = PromptEmbedCache(2), Encoder()
    assert encoder(cache, ("a", 1)) is encoder(cache, ("a", 1))
    assert encoder(cache, ("a", 2)) is not encoder(cache, ("a", 1))
    assert encoder.keys == [("a", 1), ("a", 2)]


def test_the_least_recently_used_entry_goes_first():
    cache, encoder = PromptEmbedCache(2), Encoder()
    for key in ("a", "b", "a", "c", "a", "b"):
        encoder(cache, key)
    assert encoder.keys == ["a", "b", "c", "b"]
    assert len(cache) == 2


def test_a_cache_of_no_entries_keeps_nothing():
    cache, encoder = PromptEmbedCache(0), Encoder()
    for _ in range(2):
        encoder(cache, "a")
    assert encoder.keys == ["a", "a"]
    assert len(cache) == 0


def test_nothing_is_let_go_while_requests_share_and_the_limit_holds_again_afterwards():
    cache, encoder = PromptEmbedCache(1), Encoder()
    with cache.sharing():
        for key in ("a", "b", "a"):
            encoder(cache, key)
        assert len(cache) == 2
    assert encoder.keys == ["a", "b"]
    assert len(cache) == 1


def test_a_failure_is_not_kept():
    cache = PromptEmbedCache(2)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: 1 / 0)
    assert torch.equal(cache.get("a", lambda: torch.ones(1)), torch.ones(1))


def test_pictures_are_told_apart_by_their_pixels():
    first, other = picture(8, 6), picture(8, 6, seed=1)
    assert pictures_key([first]) == pictures_key([first.copy()])
    different = ([first], [other], [first, other], [other, first], [first.convert("RGBA")])
    assert len({pictures_key(given) for given in different}) == 5


def params(**values):
    return OmniDiffusionSamplingParams(seed=7, num_inference_steps=2, output_type="latent", **values)


def counted_texts(omni, monkeypatch):
    """Grows by one entry for each run of the language model."""
    encoder = omni._engine._executor._worker._runner.pipeline.text_encoder
    language_model = encoder.language_model if hasattr(encoder, "language_model") else encoder
    calls, forward = [], language_model.forward

    def call(*arguments, **keywords):
        calls.append(1)
        return forward(*arguments, **keywords)

    monkeypatch.setattr(language_model, "forward", call)
    return calls


def test_a_repeated_negative_prompt_is_encoded_once_and_results_are_the_same_to_the_bit(
    qwen_omni, qwen_folder, monkeypatch
):
    prompts = [{"prompt": text, "negative_prompt": "blurry"} for text in ("a cat", "a red circle", "a cat")]
    values = params(height=32, width=32)
    expected = qwen_omni.generate(prompts, values)
    with Omni(str(qwen_folder), enable_prompt_embed_cache=True) as omni:
        calls = counted_texts(omni, monkeypatch)
        for _ in range(2):
            outputs = omni.generate(prompts, values)
            assert len(calls) == 3, "a cat, a red circle and blurry, each once"
            for output, same in zip(outputs, expected, strict=True):
                assert torch.equal(output.images[0], same.images[0])
    assert "enable_prompt_embed_cache" in outputs[0].receipt.accelerations
    assert "enable_prompt_embed_cache" not in expected[0].receipt.accelerations


@pytest.mark.parametrize(("build", "num_texts"), [(tiny_flux.flux, 2), (tiny_wan.wan_t2v, 1)])
def test_every_family_encodes_a_repeated_text_once(build, num_texts, tmp_path, monkeypatch):
    """FLUX.1 has two encoders, so it keeps two entries of a text."""
    folder = build(tmp_path / "model")
    with Omni(str(folder), enable_prompt_embed_cache=True) as omni:
        values = params(height=32, width=32, guidance_scale=1.0)
        first, again = omni.generate(["a cat", "a cat"], values)
        cache = omni._engine._executor._worker._runner.pipeline.prompt_embed_cache
        assert len(cache) == num_texts
    assert torch.equal(first.images[0], again.images[0])


def test_without_the_option_only_requests_that_are_prepared_together_share_a_text(qwen_omni, monkeypatch):
    calls = counted_texts(qwen_omni, monkeypatch)
    prompts = [{"prompt": text, "negative_prompt": "blurry"} for text in ("a cat", "a red circle", "a cat")]
    first = qwen_omni.generate(prompts, params(height=32, width=32))
    assert len(calls) == 3, "a cat, a red circle and blurry, each once"
    (again,) = qwen_omni.generate(prompts[0], params(height=32, width=32))
    assert len(calls) == 5, "nothing is kept for another call"
    torch.testing.assert_close(first[0].images[0], again.images[0])


def test_a_limit_that_a_kept_text_exceeds_is_still_an_error(qwen_folder):
    with Omni(str(qwen_folder), enable_prompt_embed_cache=True) as omni:
        omni.generate("a cat", params(height=32, width=32))
        with pytest.raises(InvalidRequestError, match="max_sequence_length is 2"):
            omni.generate("a cat", params(height=32, width=32, max_sequence_length=2))


def test_an_edit_of_another_picture_is_encoded_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline_qwen_image_edit, "_PICTURE_AREA", 64 * 64)
    folder = tiny_qwen_edit.qwen_image_edit(tmp_path / "edit")
    first, other = ({"prompt": "a", "multi_modal_data": {"image": picture(64, 64, seed=seed)}} for seed in (0, 1))
    with Omni(str(folder)) as omni:
        expected = [output.images[0] for output in omni.generate([first, other, first], params())]
    with Omni(str(folder), enable_prompt_embed_cache=True, prompt_embed_cache_size=2) as omni:
        calls = counted_texts(omni, monkeypatch)
        outputs = omni.generate([first, other, first], params())
    assert len(calls) == 2
    assert all(torch.equal(output.images[0], same) for output, same in zip(outputs, expected, strict=True))


def test_a_pipeline_without_the_cache_refuses_the_option(qwen_folder, monkeypatch):
    monkeypatch.delattr(QwenImagePipeline, "caches_prompt_embeds")
    with pytest.raises(FeatureNotAvailableError, match="QwenImagePipeline encodes its prompts without a cache"):
        Omni(str(qwen_folder), enable_prompt_embed_cache=True)


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_a_size_below_one_is_refused(qwen_folder, size):
    with pytest.raises(InvalidConfigError, match="prompt_embed_cache_size"):
        Omni(str(qwen_folder), enable_prompt_embed_cache=True, prompt_embed_cache_size=size)
