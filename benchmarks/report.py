"""What every benchmark records beside its figures, and how it writes them: the package's own functions."""

from __future__ import annotations

from vllm_omni.benchmarks.timing import alternate, environment, median, write_json

__all__ = ["alternate", "environment", "median", "write_json"]
