"""Logging: ``init_logger(__name__)``, as the model guide uses it."""

from __future__ import annotations

import functools
import logging
import sys

from vllm_omni import envs

_ROOT = "vllm_omni"


class _OnceFilter(logging.Filter):
    """Lets a record with ``extra={"once": True}`` pass the first time that its text is seen."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not getattr(record, "once", False):
            return True
        key = (record.name, record.getMessage())
        if key in self._seen:
            return False
        self._seen.add(key)
        return True


@functools.cache
def _configure_root() -> None:
    root = logging.getLogger(_ROOT)
    root.setLevel(envs.log_level())
    if not root.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s", "%H:%M:%S"))
        root.addHandler(handler)


def init_logger(name: str) -> logging.Logger:
    """The logger of one module. The level comes from ``VLLM_OMNI_LOG_LEVEL`` (default ``WARNING``).

    ``logger.info(..., extra={"once": True})`` writes a text once per process.
    """
    _configure_root()
    logger = logging.getLogger(name)
    if not any(isinstance(existing, _OnceFilter) for existing in logger.filters):
        logger.addFilter(_OnceFilter())
    return logger
