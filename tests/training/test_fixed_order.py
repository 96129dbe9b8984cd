"""``--deterministic`` holds for the whole of a run and no longer, and changes nothing on a CPU."""

import os
from pathlib import Path

import pytest
import torch

from kvds.training.fixed_order import fixed_order
from tests.harness.survival_runs import check_equal, make_models, starter

# An operation without a deterministic form, were it asked for on a GPU, raises: what is told is whether it would.
TOLD = """
import torch
from kvds.training import results, run
from kvds.data.loader import BatchLoader

def tell(where):
    with open({file!r}, "a") as file:
        print(where, torch.are_deterministic_algorithms_enabled(), file=file)

def joined(ask=run.init_distributed):
    tell("joined")
    return ask()

def step(loader, step, ask=BatchLoader.step):
    tell("step")
    return ask(loader, step)

def evaluate(*arguments, ask=results.evaluate_model, **keywords):
    tell("evaluation")
    return ask(*arguments, **keywords)

run.init_distributed, BatchLoader.step, results.evaluate_model = joined, step, evaluate
"""


@pytest.mark.parametrize("before", [False, True])
def test_it_is_entered_and_left(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(before, warn_only=before)
    try:
        with fixed_order(False):
            assert (
                torch.are_deterministic_algorithms_enabled() == before and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
            )
        with pytest.raises(KeyError), fixed_order(True):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()  # told to warn, attention does not change
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            assert not torch.utils.deterministic.fill_uninitialized_memory
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() == before
        assert torch.is_deterministic_algorithms_warn_only_enabled() == before
        assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_run_keeps_to_it_from_before_its_group_to_its_evaluation(rank_server, tmp_path: Path) -> None:
    make_models(tmp_path)
    start, settings = starter(rank_server, tmp_path), {"max_steps": 2, "eval_subset_size": 2, "max_new_tokens": 2}
    for name, asked in (("ordered", True), ("any", False)):
        file = tmp_path / f"{name}.told"
        codes, log = start(name, setup=TOLD.format(file=str(file)), deterministic=asked, **settings)
        assert codes == [0], log[-3000:]
        told = [line.split() for line in file.read_text().splitlines()]
        assert {where for where, _ in told} == {"joined", "step", "evaluation"}
        assert {enabled for _, enabled in told} == {str(asked)}
    check_equal(tmp_path / "ordered", tmp_path / "any")
