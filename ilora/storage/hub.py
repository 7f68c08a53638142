"""Adapters on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .files import CONFIG, GATE, PEFT_CONFIG, PEFT_WEIGHTS, README, AdapterError

FILES = [CONFIG, GATE, PEFT_CONFIG, PEFT_WEIGHTS, README]
MESSAGE = "Upload an iLoRA adapter"


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Uploads the files of a saved adapter, and no others that the folder may hold, in one commit; returns its address.
    A README.md that the repository has already is kept."""
    api = _api(token)
    repo_id = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
    files = [name for name in FILES if name != README or not api.file_exists(repo_id, README)]
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, commit_message=commit_message or MESSAGE, allow_patterns=files
    )
    return str(commit.commit_url)


def download(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The local directory with an adapter's files from the Hub, or from the cache when there is no connection.
    Raises: AdapterError where the Hub does not have it, ImportError."""
    api = _api(token)
    try:
        return Path(api.snapshot_download(repo_id, revision=revision, allow_patterns=FILES))
    except Exception as error:  # its HTTP client, and so its errors, change with versions
        raise AdapterError(f"{repo_id}: there is no such directory, and not on the Hub either: {error}") from error


def _api(token: str | bool | None) -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("the Hub is reached through huggingface_hub: pip install huggingface_hub") from error
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
