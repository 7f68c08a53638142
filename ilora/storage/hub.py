"""Adapters on the Hugging Face Hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from .checkpoint import save_adapter
from .files import CONFIG, GATE, PEFT_CONFIG, PEFT_WEIGHTS, README, AdapterError

FILES = [CONFIG, GATE, PEFT_CONFIG, PEFT_WEIGHTS, README]
_MESSAGE = "Upload an iLoRA adapter"


def push_adapter(
    model: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = _MESSAGE,
    name: str | None = None,
) -> str:
    """Saves an adapter of the model to a repository of the Hub, made if there is none; returns the commit's address.

    repo_id: "owner/name". private: of a new repository; None means the owner's default. token: None means the one that
    `hf auth login` keeps. name: which adapter; None means the active one. Of the processes of a sharded model (FSDP2),
    which all call this, one pushes; the others return "".
    Raises: as `ilora.save_adapter`; huggingface_hub's errors.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved = save_adapter(model, Path(folder) / "adapter", name=name)
        if not saved.exists():  # of a sharded model, which another process writes
            return ""
        return push_folder(saved, repo_id, private=private, token=token, commit_message=commit_message)


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Uploads the files of a saved adapter, and no others that the folder may hold, in one commit. A README.md that is
    there already is kept."""
    api = _api(token)
    repo_id = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
    files = [name for name in FILES if name != README or not api.file_exists(repo_id, README)]
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, commit_message=commit_message or _MESSAGE, allow_patterns=files
    )
    return str(commit.commit_url)


def download(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The local directory with an adapter's files from the Hub, or from the cache when there is no connection.
    Raises: AdapterError where the Hub does not have it, ImportError."""
    api = _api(token)
    try:
        return Path(api.snapshot_download(repo_id, revision=revision, allow_patterns=FILES))
    except Exception as error:  # whatever its HTTP client, another with every few versions, says of a connection
        raise AdapterError(f"{repo_id}: there is no such directory, and not on the Hub either: {error}") from error


def _api(token: str | bool | None) -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("the Hub is reached through huggingface_hub: pip install huggingface_hub") from error
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
