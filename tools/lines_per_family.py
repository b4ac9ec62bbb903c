"""Count the lines of each pipeline and its transformer, and those of all else that a reader must read for it.

    python -m tools.lines_per_family

Prints the table of docs/models/supported_models.md.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "vllm_omni" / "diffusion" / "models"
COLUMNS = ("pipeline", "transformer", "the family's other files", "shared files below")
HEADER = ["| file | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]


def num_lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def imported(path: Path) -> set[Path]:
    """The files of this package that a file imports directly."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    files = {ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names if name.startswith("vllm_omni.")}
    return {file for file in files if file.is_file()}


def reading(path: Path) -> set[Path]:
    """A file and everything of this package that it imports, directly or not."""
    seen: set[Path] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            waiting += imported(file)
    return seen


def count(pipeline: Path) -> tuple[int, ...]:
    """The lines of one pipeline's reading, by column."""
    files = reading(pipeline)
    transformers = {file for file in files if file.name.endswith("_transformer.py")}
    family = {file for file in files if file.parent == pipeline.parent} - transformers - {pipeline}
    below = files - family - transformers - {pipeline}
    return num_lines([pipeline]), num_lines(transformers), num_lines(family), num_lines(below)


def counts() -> dict[str, tuple[int, ...]]:
    """The lines of every pipeline's reading, by ``family/file``."""
    return {f"{path.parent.name}/{path.name}": count(path) for path in sorted(MODELS.glob("*/pipeline_*.py"))}


def table() -> list[str]:
    return HEADER + [f"| `{name}` | " + " | ".join(map(str, lines)) + " |" for name, lines in counts().items()]


if __name__ == "__main__":
    print("\n".join(table()))
