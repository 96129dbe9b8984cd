"""On any number of ranks, before and after a resume, the same samples make up global step n."""

import dataclasses
import logging
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from kvds.checkpoint.manifest import file_fault
from kvds.checkpoint.origin import Origin, fit_to_origin, read_origin, write_origin
from kvds.config import RunConfig
from kvds.data.run_data import load_run_data
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.errors import InputError

STEPS = 13  # of 37 rows in steps of 8: two epochs and a half
CONFIG = RunConfig(model_name="gpt2", output_dir="run", datasets=("synthetic",), synthetic_problems=37, max_length=64,
                   batch_size=2, gradient_accumulation_steps=2, eval_subset_size=0)  # fmt: skip
TWO = Origin(ranks=2, rows_per_step=8, zero_stage=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_problem_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def resumed(cfg: RunConfig, world_size: int, **changes: object) -> RunConfig:
    """What the same command becomes when two ranks' run goes on elsewhere."""
    given = dataclasses.replace(cfg, **changes)
    return fit_to_origin(given, TWO, step=3, world_size=world_size, zero_stage=3)


@pytest.mark.parametrize("kind", ["rows", "packing", "group_by_length"])
def test_a_step_has_the_same_samples_on_1_2_and_4_ranks_before_and_after_a_resume(kind, tokenizer):
    cfg = CONFIG if kind == "rows" else dataclasses.replace(CONFIG, **{kind: True})

    def micro_batches(world_size: int, steps: range) -> dict[int, list[tuple[int, ...]]]:
        """By step, the samples of each micro-batch in the order in which they are dealt out: to rank after rank."""
        own = resumed(cfg, world_size)
        loaders = [load_run_data(own, tokenizer, rank=r, world_size=world_size).loader for r in range(world_size)]
        made = {step: [loader.step(step) for loader in loaders] for step in steps}
        return {
            step: [
                tuple(i for row in of_rank[micro].row_samples for i in row)
                for micro in range(own.gradient_accumulation_steps)
                for of_rank in ranks
            ]
            for step, ranks in made.items()
        }

    straight = micro_batches(2, range(STEPS))
    assert all(len(parts) == 4 for parts in straight.values())
    ids = [sorted(i for part in straight[step] for i in part) for step in range(5)]
    assert sorted(sum(ids, [])) == list(range(37)) and [len(part) for part in ids] == [8, 8, 8, 8, 5]
    for world_size in (1, 4):
        # Each rank starts with what it is given, as a process that resumes does: no step before it was asked for.
        assert micro_batches(world_size, range(STEPS)) == straight
        assert micro_batches(world_size, range(4, STEPS)) == {step: straight[step] for step in range(4, STEPS)}


def test_gradient_accumulation_makes_up_for_the_ranks(caplog):
    with caplog.at_level(logging.INFO):
        assert resumed(CONFIG, 2) == CONFIG
        assert not caplog.text
        found = {world: resumed(CONFIG, world).gradient_accumulation_steps for world in (1, 4)}
    assert found == {1: 4, 4: 1}
    assert "step-000003 in run was saved by 2 ranks, now there are 1" in caplog.text
    # Another micro-batch with the same product is no other run, and with other ranks the rest follows from it.
    assert resumed(CONFIG, 2, batch_size=4, gradient_accumulation_steps=1).batch_size == 4
    assert resumed(CONFIG, 1, batch_size=8).gradient_accumulation_steps == 1


@pytest.mark.parametrize(
    ("world_size", "changes", "words"),
    [
        (3, {}, "--batch_size 2 × --gradient_accumulation_steps 2 × 3 ranks = 12 rows .* saved by 2 ranks with 8"),
        (8, {}, "= 32 rows .* a product of 8 .*--change_global_batch"),
        (2, {"batch_size": 4}, "--batch_size 4 × --gradient_accumulation_steps 2 × 2 ranks = 16 rows"),
        (2, {"gradient_accumulation_steps": 1}, "= 4 rows per optimizer step.*--change_global_batch"),
        (1, {"optimizer": "sgd"}, "--optimizer sgd: .* saved by 2 ranks, .* here 1; expected .*start 2 ranks"),
    ],
)
def test_what_would_be_another_run_is_refused(world_size, changes, words):
    with pytest.raises(InputError, match=words):
        resumed(CONFIG, world_size, **changes)


def test_another_global_batch_is_taken_when_asked_for(caplog):
    asked = resumed(CONFIG, 3, change_global_batch=True)
    assert asked.gradient_accumulation_steps == 2
    assert "a step has 12" in caplog.text


def test_another_zero_stage_is_refused():
    expected = "ZeRO stage 2, and step-000003 in run was saved under stage 3; expected the same stage"
    with pytest.raises(InputError, match=expected):
        fit_to_origin(CONFIG, TWO, step=3, world_size=2, zero_stage=2)


def test_the_origin_is_a_file_of_the_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints/step-000003"
    folder.mkdir(parents=True)
    [(path, entry)] = write_origin(folder, TWO).items()
    assert file_fault(path, entry) is None and read_origin(tmp_path, 3) == TWO
    for content in ("", "[]", '{"ranks": 2}', '{"ranks": "x", "rows_per_step": 8, "zero_stage": 3}'):
        Path(path).write_text(content)
        with pytest.raises(InputError, match=r"origin.json: does not say how many ranks .*--resume never"):
            read_origin(tmp_path, 3)
