"""A folder as people share networks: weights, report and a card; and its way to a hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pliant.codecs.container import replacing
from pliant.errors import ArtifactError, MissingExtraError, OutputError

MODEL, CARD, CONFIG = "model.pliant", "README.md", "config.json"
WRITTEN = (MODEL, CARD, CONFIG, "report.*", "model.onnx*")  # by `Result.save_pretrained`


def model_file(folder: Path) -> Path:
    """Return the network's file in a shared folder.

    Raises:
        ArtifactError: there is none.
    """
    if (file := folder / MODEL).is_file():
        return file
    raise ArtifactError(f"The folder {folder} must hold a {MODEL}, but does not: name its file.")


def config(model: Any, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a network that has some, and what was done to it."""
    own: Any = getattr(model, "config", None)
    told = own.to_dict() if hasattr(own, "to_dict") else {}
    kept = ("method", "budget", "seed", "versions")
    return {**told, "library_name": "pliant", "pliant": {name: report[name] for name in kept}}


def write(path: Path, text: str) -> Path:
    """Replace a file by a whole new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_config(folder: Path, settings: Mapping[str, Any]) -> Path:
    """Write the settings of a network; what is no plain data in them is written as text."""
    return write(folder / CONFIG, json.dumps(settings, indent=1, default=str) + "\n")


def push(
    folder: str | Path,
    repo: str,
    *,
    token: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
    only: Sequence[str] | None = None,
    message: str = "Add a compressed network",
) -> str:
    """Upload a folder to a hub, and return the address of what was committed.

    Args:
        folder: from `Result.save_pretrained`.
        repo: ``owner/name``; made if it is not there.
        token: of the hub; the one of `hf auth login` if None.
        private: whether a new repository is private.
        endpoint: of another hub.
        only: patterns of the files to upload; all if None.
        message: of the commit.

    Raises:
        ArtifactError: the folder holds no network.
        MissingExtraError: huggingface_hub is not installed.
        OutputError: the hub refuses.
    """
    model_file(Path(folder))
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise MissingExtraError(
            "Sharing needs huggingface_hub: pip install 'pliant[hub]'."
        ) from error
    hub = HfApi(endpoint=endpoint, token=token)
    try:
        made = hub.create_repo(repo, private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=made.repo_id,
            folder_path=str(folder),
            commit_message=message,
            allow_patterns=None if only is None else list(only),
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise OutputError(
            f"{repo} could not be uploaded ({error}): check name and token."
        ) from error
    return str(done.commit_url)
