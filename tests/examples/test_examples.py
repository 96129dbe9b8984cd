"""Every example has at most forty lines and a line in the README, runs as it stands, and trains on keys and values."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvds import KVDistiller

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
TEACHER = REPOSITORY / "launch/quickstart_teacher"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Accelerate's state is one per process: the next test begins without it."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of half the width and eight rows."""
    folder = tmp_path_factory.mktemp("examples")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "layer_types": ["full_attention"] * 2}
    config = AutoConfig.from_pretrained(TEACHER, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "student")
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained(folder / "student")
    rows = [{"prompt": f"{a} + {a + 1} = ", "completion": str(2 * a + 1)} for a in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> dict[str, Any]:
    path = REPOSITORY / "examples" / name
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    return runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_told(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40
    table = (REPOSITORY / "examples/README.md").read_text()
    assert f"| `{path.name}` |" in table and f"examples/{path.name}" in path.read_text().splitlines()[0]


@pytest.mark.parametrize("name", ["accelerate_loop.py", "sft_trainer.py", "trainer.py"])
def test_a_loop_trains_student_and_aligner(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "sft_trainer.py":
        pytest.importorskip("trl", reason="the example with TRL needs it: pip install trl")
    losses: list[tuple[float, float]] = []
    starts: dict[str, torch.Tensor] = {}
    kv_loss, fit = KVDistiller.kv_loss, KVDistiller.fit

    def seen_loss(self: KVDistiller, *arguments: Any) -> torch.Tensor:
        loss = kv_loss(self, *arguments)
        if self.fitted:  # what calibrates comes before
            losses.append((float(loss.detach()), self.kv_weight))
        return loss

    def seen_fit(self: KVDistiller, *arguments: Any) -> Any:
        found = fit(self, *arguments)
        starts.update({key: value.clone() for key, value in self.aligner.state_dict().items()})
        return found

    monkeypatch.setattr(KVDistiller, "kv_loss", seen_loss)
    monkeypatch.setattr(KVDistiller, "fit", seen_fit)
    done = run(name, monkeypatch, folder / "student", TEACHER, folder / "rows.jsonl", tmp_path / "output")
    assert len(losses) == 6 and all(loss > 0 and weight > 0 for loss, weight in losses)
    found = done["trainer"].distiller if "trainer" in done else done["distiller"]
    aligner = getattr(found, "module", found).aligner.state_dict()
    assert any(not torch.equal(aligner[key], value) for key, value in starts.items())
    student: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    before = AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()
    assert student.state_dict().keys() == before.keys()
    assert any(not torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_the_operation_alone_agrees_with_its_reference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fused_operation.py", monkeypatch)
    assert capsys.readouterr().out.endswith("same loss, same gradients\n")


@pytest.mark.parametrize("case", sorted(path.parent.name for path in (REPOSITORY / "examples").glob("*/recipe.yaml")))
def test_a_recipe_is_told_and_trains(case: str, rank_server: Any, tmp_path: Path) -> None:
    recipe = f"examples/{case}/recipe.yaml"
    assert recipe in (REPOSITORY / f"examples/{case}/README.md").read_text()
    assert f"({case}/README.md)" in (REPOSITORY / "examples/README.md").read_text()
    flags = ["--config", recipe, "--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--eval_subset_size", "4"]
    ranks = rank_server.start([*flags, "--report_to", "none", "--max_new_tokens", "2"], ranks=1, log=tmp_path / "log")
    assert ranks.wait(120) == [0], (tmp_path / "log").read_text()[-3000:]
    assert (tmp_path / "run/student/model.safetensors").exists()
