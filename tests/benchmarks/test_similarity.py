from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from vllm_omni.benchmarks import similarity
from vllm_omni.benchmarks.similarity import lpips_distance, psnr, ssim


def picture(values):
    return Image.fromarray(np.asarray(values, np.uint8))


def noise(height=24, width=31, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3))


def ssim_written_out(first, second):
    """Window by window and channel by channel, as the paper has it."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(weights, weights) / weights.sum() ** 2
    values = []
    for row in range(first.shape[0] - 10):
        for column in range(first.shape[1] - 10):
            for channel in range(3):
                x = first[row : row + 11, column : column + 11, channel].astype(float)
                y = second[row : row + 11, column : column + 11, channel].astype(float)
                mean_x, mean_y = (window * x).sum(), (window * y).sum()
                var_x, var_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
                covariance = (window * (x - mean_x) * (y - mean_y)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                values.append(
                    (2 * mean_x * mean_y + c1)
                    * (2 * covariance + c2)
                    / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
                )
    return float(np.mean(values))


def test_equal_pictures_are_alike_as_far_as_can_be_told():
    first = picture(noise())
    assert psnr(first, first) == math.inf
    assert ssim(first, first) == pytest.approx(1.0)


def test_psnr_follows_its_formula():
    dark, light = picture(np.zeros((4, 4, 3))), picture(np.full((4, 4, 3), 51))
    assert psnr(dark, light) == pytest.approx(20 * math.log10(255 / 51))


def test_ssim_matches_the_formula_written_out_and_is_symmetric():
    first = noise()
    second = np.clip(first + np.random.default_rng(1).integers(-60, 60, first.shape), 0, 255)
    assert ssim(picture(first), picture(second)) == pytest.approx(ssim_written_out(first, second), abs=1e-9)
    assert ssim(picture(first), picture(second)) == pytest.approx(ssim(picture(second), picture(first)))


def test_less_alike_pictures_score_less():
    first = noise()
    scores = []
    for strength in (5, 30, 120):
        other = picture(np.clip(first + np.random.default_rng(1).integers(-strength, strength, first.shape), 0, 255))
        scores.append((psnr(picture(first), other), ssim(picture(first), other)))
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("shape", [(5, 40, 3), (20, 20), (16, 16, 4)])
def test_small_grey_and_transparent_pictures_are_taken(shape):
    values = np.random.default_rng(0).integers(0, 256, shape)
    assert ssim(picture(values), picture(values)) == pytest.approx(1.0)
    assert ssim(picture(values), picture(255 - values)) < 0.5


def test_lpips_is_left_out_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(similarity.importlib.util, "find_spec", lambda name: None)
    assert lpips_distance() == (None, "not measured: the package lpips is not installed")


def test_lpips_takes_pixels_between_minus_one_and_one(monkeypatch):
    class Network(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, first, second):
            assert first.shape == (1, 3, 4, 4)
            return (first - second).abs().max().view(1, 1, 1, 1)

    monkeypatch.setattr(similarity.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Network))
    similarity._lpips_network.cache_clear()
    distance, note = lpips_distance()
    assert note == "AlexNet"
    assert distance(picture(np.zeros((4, 4))), picture(np.full((4, 4), 255))) == 2.0
    similarity._lpips_network.cache_clear()


def test_lpips_that_does_not_load_is_said(monkeypatch):
    def broken(net, verbose):
        raise OSError("no weights")

    monkeypatch.setattr(similarity.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=broken))
    similarity._lpips_network.cache_clear()
    assert lpips_distance() == (None, "not measured: lpips does not load (OSError: no weights)")
