"""One rank from its flags to its exit code, where it does not come to train."""

import json

import pytest

from kvds.config.recipe import named_output_dir
from kvds.identity.folder_owner import FolderOwner
from kvds.training import rank
from kvds.training.rank import run_rank


@pytest.fixture(autouse=True)
def signals_given_back(monkeypatch):
    """A rank hears signals until its process ends; here other tests come after it."""
    made, install = [], rank.StopRequest.install
    monkeypatch.setattr(rank.StopRequest, "install", lambda stop, leave: (made.append(stop), install(stop, leave))[1])
    yield
    for stop in reversed(made):
        stop.remove()


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """A run's folder that an earlier start left as preempted."""
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "preempted").write_text("SIGTERM arrived\n")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    (tmp_path / "recipe.yaml").write_text(f"output_dir: {tmp_path}\nmodel_name: gpt2\nlr: many\n")
    return tmp_path


FAULTS = {
    "flags": ["--output_dir", "@", "--nonsense"],
    "dashes": ["--output-dir=@", "--model_name", "gpt2", "--lr", "0"],
    "recipe": ["--config", "@/recipe.yaml"],
    "rows": ["--output_dir", "@", "--model_name", "gpt2", "--datasets", "@/bad.jsonl"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_start_that_is_refused_is_not_preempted(fault, marked):
    flags = [token.replace("@", str(marked)) for token in FAULTS[fault]]
    assert run_rank([*flags, "--dry_run"]) == 2 and (marked / "preempted").exists()  # asks, and changes nothing
    with FolderOwner(marked):
        assert run_rank(flags) == 2 and (marked / "preempted").exists()  # another job's word
    assert run_rank(flags) == 2 and not (marked / "preempted").exists()


def test_only_the_first_rank_writes(marked, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run_rank(["--output_dir", str(marked), "--nonsense"]) == 2 and (marked / "preempted").exists()


@pytest.mark.parametrize("flags", [[], ["--output_dir"], ["--config", "nowhere.yaml"], ["--output_dir", "a\0b"]])
def test_where_no_folder_is_named_nothing_is_looked_for(flags):
    assert named_output_dir(flags) is None
