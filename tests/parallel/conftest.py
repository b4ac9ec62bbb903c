from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rank_pool import RankPool
from tests import tiny, tiny_flux, tiny_qwen_edit, tiny_wan
from vllm_omni.entrypoints.omni import SHIPPED_MODELS


@pytest.fixture(scope="session")
def two_ranks():
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks():
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A function from the name of a model to its folder, which it makes at the first call."""
    made = {f"shipped_{task.rpartition('-')[2]}": str(folder) for task, folder in SHIPPED_MODELS.items()}
    makers = {
        "qwen_image": tiny.qwen_image,
        "qwen_image_edit": tiny_qwen_edit.qwen_image_edit,
        "qwen_image_edit_plus": tiny_qwen_edit.qwen_image_edit_plus,
        "qwen_image_layered": tiny_qwen_edit.qwen_image_layered,
        "flux": tiny_flux.flux,
        "flux_kontext": tiny_flux.flux_kontext,
        "wan_t2v": tiny_wan.wan_t2v,
        "wan_ti2v": tiny_wan.wan_ti2v,
        "wan_i2v": tiny_wan.wan_i2v,
        "wan_i2v_21": lambda folder: tiny_wan.wan_i2v(folder, num_experts=1),
    }

    def folder(name: str) -> str:
        if name not in made:
            made[name] = str(makers[name](tmp_path_factory.mktemp("parallel") / name))
        return made[name]

    return folder


@pytest.fixture(scope="session")
def folder_of_class(folders, tmp_path_factory):
    """A function from the name of a pipeline class to a folder of the tiny Qwen-Image that names it."""

    def folder(class_name: str) -> Path:
        made = tmp_path_factory.mktemp(class_name)
        for entry in Path(folders("qwen_image")).iterdir():
            if entry.is_dir():
                (made / entry.name).symlink_to(entry)
        index = (Path(folders("qwen_image")) / "model_index.json").read_text()
        (made / "model_index.json").write_text(index.replace('"QwenImagePipeline"', f'"{class_name}"'))
        return made

    return folder
