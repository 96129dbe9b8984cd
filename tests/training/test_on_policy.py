"""On-policy runs: on any number of ranks the same completions, resumed to the bit, with every form of rows and student,
and each rank waits for what the others write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvds.training.student_copy import StudentCopy
from tests.harness.forked_ranks import RankServer
from tests.harness.survival_runs import at_call, check_equal, cut, flags, make_models, records
from tests.kv.test_capture import inputs, make_model

SECONDS = 600  # generous: machines are shared
ON_POLICY = {
    "on_policy_share": 0.5, "on_policy_max_new_tokens": 40, "on_policy_temperature": 8, "on_policy_top_p": 0.99,
    "logit_kd_weight": 0.5, "logging_steps": 1, "max_steps": 6, "save_steps": 3, "lr": 0.003, "seed": 5,
    "student_config_overrides": "attention_dropout=0.0",  # whose masks are those of micro-batches
}  # fmt: skip
# Global batches of 4, of which one or two rows are written: under "adapted" one of two ranks has none to write.
PLAIN = {"alignment_mode": "none", "kv_weight": 1, "kv_weight_schedule": "constant", "max_steps": 3}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "two": (2, {"batch_size": 1}),
    "all": (1, PLAIN | {"on_policy_share": 1, "task_weight": 0, "packing": "true"}),
    "adapted": (2, PLAIN | {"on_policy_share": 0.25, "batch_size": 1, "lora_r": 2, "logit_kd_loss": "jsd"}),
    "one_row": (1, {"tokens_per_batch": 128, "kv_method": "uniform", "kv_budget": 0.5, "max_steps": 3}),
    "chosen": (1, {"kv_method": "rkv", "kv_budget": 0.5, "max_steps": 3, "kv_weight": "balance:1.0",
                   "kv_weight_schedule": "constant", "batch_size": 1, "gradient_accumulation_steps": 1}),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("on_policy")
    make_models(folder)

    def run(name: str, ranks: int, changes: dict[str, Any]) -> None:
        log = folder / f"{name}.log"
        tell = f'open("{folder}/{name}." + str(rank), "a").write(repr(arguments) + chr(10))'
        setup = at_call("kvds.training.on_policy", "with_completion", tell)
        values = flags(folder, folder / name, **ON_POLICY | changes)
        found = server.start(values, ranks=ranks, log=log, setup=setup).wait(SECONDS)
        assert found == [0] * ranks, log.read_text()[-4000:]

    with RankServer() as server:
        for name, (ranks, changes) in RUNS.items():
            run(name, ranks, changes)
        cut(folder / "two", folder / "resumed", 3)
        run("resumed", *RUNS["two"])
    yield folder


def written(run: Path, rank: int = 0) -> list[str]:
    """Rows of the data with what was written behind their prompts, as ``rank`` took them, in order."""
    return run.with_name(f"{run.name}.{rank}").read_text().splitlines()


def series(run: Path, key: str) -> list[float]:
    return [line[key] for line in records(run) if key in line]


def test_ranks_write_together_what_one_writes_alone(runs: Path) -> None:
    assert len(written(runs / "one")) == 2 * 4 + 1 + 2  # the last step of an epoch has two rows
    assert written(runs / "two", 0) == written(runs / "two", 1) == written(runs / "one")
    assert series(runs / "one", "on_policy/share") == [0.5] * 6
    assert len(set(series(runs / "one", "on_policy/completion_tokens"))) > 1
    assert 0 < sum(series(runs / "one", "on_policy/ended")) < 6
    for key in ("loss/task", "loss/logit_kd", "loss/kv"):
        assert series(runs / "one", key) == pytest.approx(series(runs / "two", key), rel=1e-4)


def test_a_resumed_run_writes_and_ends_the_same_to_the_bit(runs: Path) -> None:
    assert "resumed from step 3 of 6" in (runs / "resumed.log").read_text()
    assert written(runs / "resumed") == written(runs / "two")[6:]
    check_equal(runs / "two", runs / "resumed")


def test_a_rank_without_a_prompt_waits_for_the_others(runs: Path) -> None:
    assert series(runs / "adapted", "on_policy/share") == [0.25] * 3
    assert written(runs / "adapted", 0) == written(runs / "adapted", 1) and len(written(runs / "adapted")) == 3


def test_completions_alone_are_judged_by_the_teacher_alone(runs: Path) -> None:
    assert series(runs / "all", "on_policy/share") == [1.0] * 3 and series(runs / "all", "loss/task") == []
    for total, kd in zip(series(runs / "all", "loss/total"), series(runs / "all", "loss/logit_kd"), strict=True):
        assert total == pytest.approx(0.5 * kd) and kd > 0


@pytest.mark.parametrize("run", ["adapted", "one_row", "all", "chosen"])
def test_every_form_of_rows_and_students_learns_from_completions(run: str, runs: Path) -> None:
    assert len(series(runs / run, "loss/total")) == 3
    assert all(0 < value < 20 for value in series(runs / run, "loss/logit_kd"))
    tokens = series(runs / run, "on_policy/completion_tokens")
    assert all(1 <= value <= 40 for value in tokens) and len(tokens) == (1 if run == "chosen" else 3)
    before, after = (load_file(path / "student/model.safetensors") for path in (runs, runs / run))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_time_that_writing_takes_is_told(runs: Path) -> None:
    lines = [json.loads(line) for line in (runs / "two/metrics.jsonl").read_text().splitlines()]
    assert all(line["perf/seconds_generate"] > 0 for line in lines if "loss/total" in line)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3_text"])
def test_the_copy_says_what_the_student_says_now(family: str) -> None:
    model = make_model(family)
    copy = StudentCopy(model, torch.device("cpu"))
    for change in (0.0, 0.5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(change * torch.randn_like(parameter))
        state = torch.get_rng_state()
        copy.refresh()
        assert torch.equal(state, torch.get_rng_state())
        with torch.no_grad():
            torch.testing.assert_close(copy.model(**inputs()).logits, model.eval()(**inputs()).logits)
    assert not any(parameter.requires_grad for parameter in copy.model.parameters())
