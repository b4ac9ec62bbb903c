"""Tasks: which shipped model they choose, and what is refused before any weights are read."""

from __future__ import annotations

import pytest
from PIL import Image

from tests import tiny_qwen_edit, tiny_wan
from vllm_omni import Omni
from vllm_omni.diffusion.data import TASKS
from vllm_omni.diffusion.engine.configure import configure
from vllm_omni.diffusion.registry import resolve_diffusion_model
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.entrypoints.omni import SHIPPED_MODELS, choose_model
from vllm_omni.errors import InvalidConfigError


@pytest.fixture(scope="module")
def folders(tmp_path_factory, qwen_folder):
    """Checkpoints without weights: whoever reads some fails by another error."""
    root = tmp_path_factory.mktemp("tasks")
    built = {
        "text-to-video": tiny_wan.wan_t2v(root / "t2v", num_experts=1),
        "text and image to video": tiny_wan.wan_ti2v(root / "ti2v"),
        "image-edit": tiny_qwen_edit.qwen_image_edit(root / "edit"),
    }
    for folder in built.values():
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()
    return {"text-to-image": qwen_folder, **built}


@pytest.mark.parametrize("task", SHIPPED_MODELS)
def test_without_a_model_the_task_chooses_the_one_that_ships(task):
    assert choose_model(None, task) == str(SHIPPED_MODELS[task])
    config = configure(str(SHIPPED_MODELS[task]), {})
    assert task in resolve_diffusion_model(config.model_class_name).request_spec(config).tasks


def test_without_a_task_it_is_text_to_image():
    assert choose_model(None, None) == str(SHIPPED_MODELS["text-to-image"])
    assert choose_model("some/model", "text-to-video") == "some/model"


def test_the_weights_of_a_hub_id_are_downloaded_only_when_all_else_is_right(folders, monkeypatch):
    asked = []

    def download(_name, *, allow_patterns, **_options):
        asked.append(allow_patterns)
        return str(folders["text-to-image"])

    monkeypatch.setattr("vllm_omni.diffusion.model_loader.utils.snapshot_download", download)
    for wrong in ({"task": "text-to-video"}, {"dtype": "int4"}):
        with pytest.raises(InvalidConfigError):
            Omni("org/name", **wrong)
    assert "*" not in {pattern for patterns in asked for pattern in patterns}
    configure("org/name", {}, "text-to-image")
    assert asked[-1] == ["*"]


@pytest.mark.parametrize("task", sorted(TASKS.keys() - SHIPPED_MODELS.keys()))
def test_a_task_without_a_shipped_model_asks_for_one(task):
    with pytest.raises(InvalidConfigError, match="no model for it ships along, only for text-to-image") as caught:
        Omni(task=task)
    assert caught.value.option == "task"


@pytest.mark.parametrize(
    ("model", "task", "does"),
    [
        ("text-to-image", "text-to-video", "does text-to-image;"),
        ("text-to-image", "image-edit", "does text-to-image;"),
        ("image-edit", "text-to-image", "does image-edit;"),
        ("text-to-video", "image-to-video", "does text-to-video;"),
        ("text and image to video", "image-edit", "does text-to-video, image-to-video;"),
    ],
)
def test_a_task_that_the_model_cannot_do_is_an_error_before_its_weights_are_read(folders, model, task, does):
    with pytest.raises(InvalidConfigError, match=does) as caught:
        Omni(str(folders[model]), task=task)
    assert caught.value.option == "task"


def test_an_unknown_task_suggests_the_nearest():
    with pytest.raises(InvalidConfigError, match="did you mean 'text-to-video'"):
        Omni(task="text-2-video")


def test_a_task_that_fits_changes_nothing(qwen_folder):
    with Omni(str(qwen_folder), task="text-to-image") as omni:
        assert omni.od_config.model == str(qwen_folder)


@pytest.mark.parametrize(
    ("task", "image", "message"),
    [
        ("image-edit", False, "--task image-edit needs a picture; give --image FILE"),
        ("image-to-video", False, "--task image-to-video needs a picture"),
        ("text-to-image", True, "--task text-to-image takes no picture; leave --image out"),
    ],
)
def test_a_picture_too_few_or_too_many_is_said_before_anything_is_loaded(task, image, message, tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "red.png")
    picture = ["--image", str(tmp_path / "red.png")] if image else []
    assert main(["generate", "a cat", "--model", "/nowhere/at/all", "--task", task, *picture]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_task_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "a cat", "--task", "text-to-audio"])
    shown = capsys.readouterr().err
    assert "--task" in shown
    assert all(task in shown for task in TASKS)
