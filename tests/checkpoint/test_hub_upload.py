"""A student is uploaded at the end of a run, or refused before it; a hub that fails costs a warning."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from kvds.checkpoint.hub_upload import push_student
from kvds.config.recipe import parse_run_config
from kvds.errors import InputError

FLAGS = ["--model_name", "gpt2", "--push_to_hub"]


class Hub:
    """Stands for the hub's client and notes what it is asked for."""

    calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repository: str, **known: Any) -> Any:
        self.calls.append(("create", {"repository": repository, **known}))

        class Address(str):
            repo_id = f"owner/{repository}"

        return Address(f"https://hub/owner/{repository}")

    def upload_folder(self, **known: Any) -> None:
        self.calls.append(("upload", known))


def test_a_student_goes_into_a_repository_that_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.calls.clear()
    assert push_student(tmp_path / "student", "small", private=True) == "https://hub/owner/small"
    [(_, made), (_, uploaded)] = Hub.calls
    assert made == {"repository": "small", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "owner/small" and uploaded["folder_path"] == tmp_path / "student"


def test_a_hub_that_refuses_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("403: no write access")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(create_repo=refuse))
    assert push_student(tmp_path / "student", "a/b", private=False) is None
    [record] = caplog.records
    assert record.getMessage() == (
        f"push_to_hub: 403: no write access; the student is whole in {tmp_path}/student (try again: hf upload a/b "
        f"{tmp_path}/student)"
    )


def test_without_a_way_or_a_token_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*FLAGS, "--output_dir", str(tmp_path / "run")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="push_to_hub=true: expected a way to the hub, but HF_HUB_OFFLINE is set"):
        parse_run_config(flags)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(InputError, match=r"push_to_hub=true: expected a token that may write \(hf auth login"):
        parse_run_config(flags)
    monkeypatch.setenv("RANK", "1")  # it does not upload, and may be on a node that has no token
    assert parse_run_config(flags).push_to_hub
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_any")
    assert parse_run_config(flags).push_to_hub
    with pytest.raises(InputError, match="expected --hub_model_id NAME"):
        parse_run_config([*FLAGS, "--output_dir", str(tmp_path / "a run")])
    assert parse_run_config([*FLAGS, "--output_dir", str(tmp_path / "a run"), "--hub_model_id", "me/student"])
