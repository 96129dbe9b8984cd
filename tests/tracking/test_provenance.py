"""The command that a run's records name is the one that was typed."""

import sys
from types import SimpleNamespace

import pytest

from kvds.tracking.provenance import typed_command


@pytest.mark.parametrize(
    ("module", "script", "told"),
    [
        ("kvds.__main__", "@/site-packages/kvds/__main__.py", "python -m kvds"),  # deepspeed --module, torchrun -m, too
        ("kvds.cli", "@/site-packages/kvds/cli.py", "python -m kvds.cli"),
        (None, "@/bin/kvds", "kvds"),
        (None, "launch/distill.py", "python launch/distill.py"),
    ],
)
def test_a_command_is_told_as_it_was_typed(module, script, told, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/kvds").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    spec = None if module is None else SimpleNamespace(name=module)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    script = script.replace("@", str(tmp_path))
    monkeypatch.setattr("sys.argv", [script, "--local_rank=1", "distill", "--run_name", "a b"])
    assert typed_command() == f"{told} distill --run_name 'a b'"
