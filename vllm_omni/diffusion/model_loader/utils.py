"""Finding a model's files: a local folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vllm_omni.errors import HubUnreachableError, InvalidModelFolderError, ModelNotFoundError, first_line


def download_weights_from_hf_specific(
    model_name_or_path: str,
    cache_dir: str | None,
    allow_patterns: Sequence[str],
    revision: str | None = None,
) -> str:
    """The local folder of a hub repository's files that match ``allow_patterns``, downloaded if they are not cached.

    Raises ``ModelNotFoundError`` if the hub does not know it and ``HubUnreachableError`` if the hub does not answer.
    """
    try:
        return snapshot_download(
            model_name_or_path, revision=revision, cache_dir=cache_dir, allow_patterns=list(allow_patterns)
        )
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"revision={revision!r} of {model_name_or_path!r} does not exist") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFoundError(
            f"model={model_name_or_path!r} is neither a folder on this machine nor a repository that the hub shows you;"
            " check the spelling, and log in with `hf auth login` if it is private"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise HubUnreachableError(
            f"model={model_name_or_path!r} is not in the local cache and the hub cannot be reached"
            f" ({first_line(error)});"
            " connect to the network, or give the path of a local folder"
        ) from error


def resolve_model_folder(model: str, revision: str | None, *, weights: bool = True) -> Path:
    """The local folder of ``model``, a path or a hub id. Without ``weights`` only configurations and tokenizers."""
    path = Path(model).expanduser()
    if not model.strip():
        raise ModelNotFoundError(f"model={model!r} is empty; give the path of a folder or a hub id")
    if path.is_dir():
        if revision is not None:
            raise InvalidModelFolderError(f"revision={revision!r} goes with a hub id; {str(path)!r} is a local folder")
        return path
    if path.exists():
        raise InvalidModelFolderError(
            f"model={model!r} is a file; give the folder of a diffusers pipeline (it holds model_index.json)"
        )
    if path.is_absolute() or model.startswith((".", "~")):
        raise ModelNotFoundError(f"model={model!r}: there is no such folder")
    patterns = ["*"] if weights else ["*.json", "*.jinja", "*.txt", "*.model"]
    return Path(download_weights_from_hf_specific(model, None, patterns, revision))
