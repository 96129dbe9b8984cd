"""Upload of an exported student to the Hugging Face hub; what goes wrong there costs no run."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

log = logging.getLogger("kvds")


def push_student(student: Path, repository: str, *, private: bool) -> str | None:
    """Upload a student with its tokenizer and model card.

    Args:
        student: The folder that a run exported.
        repository: NAME, below the owner of the token, or OWNER/NAME; made if missing.
        private: Of a repository that is made.

    Returns:
        Its address; None where the hub refused, which is told with the command to try again.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=student, commit_message="Student distilled with kvds")
    except Exception as error:  # accounts, networks and the hub fail in their own ways
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        again = f"hf upload {shlex.quote(repository)} {shlex.quote(str(student))}"
        log.warning("push_to_hub: %s; the student is whole in %s (try again: %s)", reason, student, again)
        return None
    log.info("pushed to the hub: %s", address)
    return str(address)
