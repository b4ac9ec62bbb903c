"""The import rule of docs/architecture.md: imports go down only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tools import lines_per_family
from vllm_omni import errors

ROOT = Path(__file__).parent.parent / "vllm_omni"

# From the bottom up. A module belongs to the longest entry that is a prefix of its path.
LAYERS: list[tuple[str, ...]] = [
    ("logger", "envs", "errors", "version", "diffusion/options"),
    ("inputs", "outputs", "diffusion/request", "diffusion/data", "diffusion/cache_config", "diffusion/start_config"),
    ("platforms", "diffusion/distributed"),
    ("diffusion/attention", "diffusion/layers", "diffusion/quantization"),
    (
        "diffusion/latents",
        "diffusion/guidance",
        "diffusion/schedulers",
        "diffusion/encoders",
        "diffusion/denoise",
        "diffusion/denoise_state",
        "diffusion/latent_preview",
        "diffusion/step_plan",
        "diffusion/step_memory",
        "diffusion/staged_forward",
        "diffusion/sequences",
        "diffusion/postprocess",
        "diffusion/model_loader",
        "diffusion/utils",
        "media",
        "benchmarks",
    ),
    ("diffusion/models",),
    ("diffusion/registry", "diffusion/cache", "diffusion/compile", "diffusion/cuda_graph", "diffusion/modulations"),
    ("diffusion/worker",),
    ("diffusion/engine",),
    ("entrypoints",),
    ("__main__",),
]


def modules() -> dict[str, Path]:
    return {str(path.relative_to(ROOT).with_suffix("")).removesuffix("/__init__"): path for path in ROOT.rglob("*.py")}


def entry_of(module: str) -> tuple[int, str]:
    matches = [
        (len(entry), level, entry)
        for level, entries in enumerate(LAYERS)
        for entry in entries
        if module == entry or module.startswith(entry + "/")
    ]
    assert matches, f"{module} has no place in LAYERS; give it one"
    _, level, entry = max(matches)
    return level, entry


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports when it is loaded or type-checked."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    known = modules()
    inner = {name.removeprefix("vllm_omni.").replace(".", "/") for name in names if name.startswith("vllm_omni.")}
    return {name for name in inner if name in known}


PACKAGES = {"__init__", ".", "diffusion"}


@pytest.mark.parametrize("module", sorted(set(modules()) - PACKAGES))
def test_imports_go_down_only(module):
    level, entry = entry_of(module)
    for target in imported_modules(modules()[module]) - PACKAGES:
        target_level, target_entry = entry_of(target)
        if entry == target_entry:
            continue
        assert target_level <= level, f"{module} imports {target}, which lies above it"


@pytest.mark.parametrize("module", sorted(name for name in modules() if name.startswith("diffusion/models/")))
def test_a_model_imports_no_other_models_folder(module):
    folder = module.split("/")[2]
    for target in imported_modules(modules()[module]):
        if target.startswith("diffusion/models/"):
            assert target.split("/")[2] == folder


def test_nothing_outside_the_models_and_the_tables_knows_a_models_name():
    tables = ("diffusion/models/", "diffusion/registry", "diffusion/cache/extractors")
    shipped = re.compile("|".join(path.name for path in (ROOT / "assets").iterdir()))
    for module, path in modules().items():
        if module.startswith(tables):
            continue
        code = shipped.sub("", ast.unparse(_without_docstrings(ast.parse(path.read_text()))))
        found = re.findall("flux|wan|qwen", code, re.IGNORECASE)
        assert not found, f"{module} knows the model names {found}"


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0] = ast.Pass()
    return tree


def test_no_file_is_longer_than_the_contract_allows():
    for module, path in modules().items():
        limit = 450 if module.endswith("_transformer") else 300
        if module.rpartition("/")[2].startswith("pipeline_"):
            limit = 250
        lines = len(path.read_text().splitlines())
        assert lines <= limit, f"{module} has {lines} lines, more than {limit}"


def test_the_table_of_lines_per_family_is_true():
    page = (ROOT.parent / "docs/models/supported_models.md").read_text()
    rows = re.findall(r"^\| `(\w+/pipeline_\w+\.py)` \| (.+) \|$", page, re.MULTILINE)
    stated = {name: [int(cell) for cell in cells.split(" | ")] for name, cells in rows}
    counted = lines_per_family.counts()
    advice = "paste what `python -m tools.lines_per_family` prints into docs/models/supported_models.md"
    assert stated.keys() == counted.keys(), advice
    for name, lines in counted.items():
        # A line more or less is no news to a reader.
        assert stated[name] == pytest.approx(lines, rel=0.1, abs=10), f"{name}: {advice}"


@pytest.mark.parametrize("page", ["flux", "qwen_image", "wan2_2"])
def test_the_lines_beside_those_of_diffusers_are_true(page):
    text = (ROOT.parent / f"docs/models/{page}.md").read_text()
    rows = re.findall(r"^\| [^|`]+: (`[^|]+`) \| ([\d,]+) \|", text, re.MULTILINE)
    assert len(rows) >= 3
    for names, stated in rows:
        files = [next((ROOT / "diffusion").rglob(name)) for name in re.findall(r"`(\w+\.py)`", names)]
        assert int(stated.replace(",", "")) == pytest.approx(lines_per_family.num_lines(files), rel=0.1), names


def test_every_error_that_a_user_can_meet_is_documented():
    page = (ROOT.parent / "docs/parameters.md").read_text()
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert {name for name in kinds if f"{name}`" not in page} == set()
