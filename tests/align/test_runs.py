"""Whole runs of the further alignment modes: evaluated, resumed to the same bits, profiled."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file

from kvds.checkpoint.aligner_file import load_aligner
from kvds.cli import main
from tests.training.test_resume import flags, interrupt, models, start  # noqa: F401 (models is a fixture)

MODES = {
    "hidden": {"alignment_mode": "hidden", "kv_parts": "auto", "gradient_checkpointing": "true"},
    "relation": {"alignment_mode": "relation", "kv_parts": "auto", "relation_kind": "cosine", "kv_loss": "l1"},
    "structural_kv": {"alignment_mode": "structural_kv", "kv_parts": "auto"},
    "segment": {"align_tokens": "segment", "map_start": "procrustes"},
}


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):  # noqa: F811
    """Each of ``MODES``, 6 steps straight, and again interrupted and resumed from step 3; one process each time."""
    folder = tmp_path_factory.mktemp("runs")

    def train(runs: dict[str, list[str]]) -> None:
        (folder / "runs.json").write_text(json.dumps(runs))
        done = start("tests/harness/ranked_runs.py", folder / "runs.json")
        assert done.returncode == 0, done.stderr[-4000:]

    wanted = {
        name: {"map_start": "random", "eval_subset_size": 4, "max_new_tokens": 2, "handoff_weight": 0, **changes}
        for name, changes in MODES.items()
    }
    train({name: flags(models, folder / name, **changes) for name, changes in wanted.items()})
    for name in MODES:
        interrupt(folder / name, folder / f"{name}-resumed")
    train({name: flags(models, folder / f"{name}-resumed", resume="auto", **c) for name, c in wanted.items()})
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_a_run_has_records_and_a_held_out_loss_and_resumes_to_the_same_bits(runs, mode):
    lines = [json.loads(line) for line in (runs / mode / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss/kv" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss/kv"] > 0 and line["kv/weight"] > 0 and line["kv/norm_ratio"] > 0 for line in trained)
    assert trained[0]["kv/gradient_ratio"] > 0
    held_out = json.loads((runs / mode / "eval.json").read_text())["all"]
    assert 0 < held_out["kv_loss"] < 10
    assert ("kv_loss_keys" in held_out) == (mode != "hidden")
    assert ("kv_loss_attention" in held_out) == ("loss/kv_attention" in trained[0]) == (mode == "structural_kv")
    files = [load_file(runs / run / "student/model.safetensors") for run in (mode, f"{mode}-resumed")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    straight, resumed = (load_aligner(runs / run / "map_aligner.pt") for run in (mode, f"{mode}-resumed"))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    begun = load_aligner(runs / mode / "map_aligner_start.pt").state_dict()
    moved = [name for name, p in straight.named_parameters() if not torch.equal(p, begun[name])]
    assert len(moved) == len(dict(straight.named_parameters())) > 0
    assert all(torch.equal(b, begun[name]) for name, b in straight.named_buffers())


@pytest.mark.parametrize("mode", MODES)
def test_profile_tells_fit_and_spectrum(runs, mode, capsys):
    output = runs / f"{mode}-profile"
    assert main(["profile", "--run", str(runs / mode), "--fit_rows", "6", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    found = json.loads((output / "profile.json").read_text())
    measure = "r2" if mode in ("hidden", "segment") else "loss"
    for part, before in found["fit"]["before"].items():
        after = found["fit"]["after"][part]
        assert len(before[measure]) == len(after[measure]) and before[measure] != after[measure]
        assert ("r2" in before) == (measure == "r2") and all(value < 1 for value in before.get("r2", []))
    pictures = {"aligner.png", "aligner_fit.png", "aligner_spectrum.png"} - (
        {"aligner_spectrum.png"} if mode == "relation" else set()
    )
    assert {path.name for path in output.iterdir()} == {*pictures, "profile.json"}
    assert all(imread(output / name).std() > 0.02 for name in pictures)
    assert ("R² of the map on held-out text" in text) == (measure == "r2") and "before     after" in text
    shutil.rmtree(output)
