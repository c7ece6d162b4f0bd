"""A tuned model on its way to the Hub."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError, require
from .pretrained import in_one_line


def check_login() -> None:
    """Raises InputError if nobody is logged in to the Hub, or it cannot be reached, before a run that is to end there."""
    try:
        require("huggingface_hub").HfApi().whoami()
    except (OSError, ValueError) as e:  # its errors of HTTP and of a missing token are of these kinds
        raise InputError(f"--push-to-hub: {in_one_line(e)}; `hf auth login` logs in") from None


def push(folder: Path, name: str) -> None:
    """Puts a folder into a repository of the Hub, which is made where there is none.

    Raises:
        InputError: the Hub does not take it. The folder is whole all the same.
    """
    api = require("huggingface_hub").HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Tuned with lozo_kernels")
    except (OSError, ValueError) as e:
        raise InputError(
            f"the model is saved in {folder}, but was not pushed: {in_one_line(e)}; `hf upload {name} {folder}` tries again"
        ) from None
