"""Video files, written and read back."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vllm_omni.diffusion.postprocess import videos_from_pixels
from vllm_omni.media import write_video


def gradient(num_frames=5, height=32, width=48):
    """``[F, H, W, 3]`` in [0, 1]: smooth, so that a codec keeps it, and different in every frame."""
    frames, rows, columns = np.meshgrid(
        np.arange(num_frames) / 10, np.linspace(0, 0.8, height), np.linspace(0, 1, width), indexing="ij"
    )
    return np.stack([rows, columns, frames], axis=-1).astype(np.float32)


def read_back(file):
    with av.open(file) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return stream.codec_context, float(stream.average_rate), np.stack(frames)


@pytest.mark.parametrize("fps", [16, 24, 23.976])
def test_a_video_is_read_back_with_codec_frames_and_rate(tmp_path, fps):
    path = tmp_path / "video.mp4"
    write_video(gradient(), path, fps)
    codec, rate, frames = read_back(str(path))
    assert (codec.name, codec.pix_fmt, codec.width, codec.height) == ("h264", "yuv420p", 48, 32)
    assert rate == pytest.approx(fps, rel=1e-4)
    assert len(frames) == 5
    assert np.abs(frames / 255 - gradient()).mean() < 0.02


def test_pictures_arrays_and_tensors_give_the_same_file():
    array = gradient()
    pictures = [Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in array]
    files = []
    for frames in (array, pictures, torch.from_numpy(array).permute(0, 3, 1, 2)):
        file = io.BytesIO()
        write_video(frames, file, 16)
        files.append(file.getvalue())
    assert files[0] == files[1] == files[2]


def test_odd_sizes_are_padded_by_their_last_row_and_column(tmp_path):
    path = str(tmp_path / "odd.mp4")
    array = gradient(height=31, width=47)
    write_video(array, path, 16)
    _, _, frames = read_back(path)
    assert frames.shape == (5, 32, 48, 3)
    assert np.abs(frames[:, :31, :47] / 255 - array).mean() < 0.02
    assert np.abs(frames[:, 31].astype(int) - frames[:, 30]).max() < 24


@pytest.mark.parametrize("frames", [[], np.zeros((2, 8, 8)), np.zeros((2, 8, 8, 4)), torch.zeros(3, 8, 8), None])
def test_what_is_no_video_is_refused(tmp_path, frames):
    with pytest.raises(ValueError, match=r"frames is .*RGB frame"):
        write_video(frames, tmp_path / "video.mp4", 16)
    assert not (tmp_path / "video.mp4").exists()


def test_pixels_become_one_video_per_output():
    pixels = torch.linspace(-1, 1, 2 * 3 * 5 * 4 * 6).view(2, 3, 5, 4, 6)
    values = pixels * 0.5 + 0.5
    torch.testing.assert_close(videos_from_pixels(pixels, "pt"), values.permute(0, 2, 1, 3, 4))
    array = videos_from_pixels(pixels, "np")
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, values.permute(0, 2, 3, 4, 1).numpy())
    videos = videos_from_pixels(pixels)
    assert [len(video) for video in videos] == [5, 5]
    np.testing.assert_array_equal(np.asarray(videos[1][2]), (array[1, 2] * 255).round().astype(np.uint8))
