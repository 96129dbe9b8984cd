"""A row that is alone in its micro-batch has no other's keys and values to borrow: nothing of it is matched."""

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from kvds.config.recipe import parse_run_config
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.teacher.token_selection import TokenChoice
from tests.harness.small_run_data import load
from tests.harness.survival_runs import make_models, records, starter


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_problem_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["shuffled", "matched"])
@pytest.mark.parametrize("align", ["position", "segment"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_row_alone_matches_nothing_where_rows_exchange(
    tokenizer: Any, tmp_path: Any, kind: str, align: str, accumulation: int
) -> None:
    options = {"teacher_kv": kind, "align_tokens": align, "gradient_accumulation_steps": accumulation}
    data = load(tokenizer, tmp_path, synthetic_problems=21, eval_subset_size=5, **options)
    flags = [f"--{key}={value}" for key, value in options.items()]
    cfg = parse_run_config(["--model_name", "gpt2", "--output_dir", "x", "--batch_size", "4", *flags])
    choice = TokenChoice(cfg, cfg.seed)
    lone = 0
    for loader, shares in ((data.loader, accumulation), (data.eval_loader, 1)):
        for step in range(loader.steps_per_epoch):
            batches = loader.step(step)
            kept = [choice.select(batch, None).mask for batch in batches]
            counted = sum(int(mask.sum()) for mask in kept)
            assert batches[0].position_normalizer * shares == pytest.approx(max(1, counted))
            for batch, mask in zip(batches, kept, strict=True):
                real = batch.sample_ids >= 0
                alone = int(real.sum()) == 1
                lone += alone
                rows = torch.zeros_like(real) if alone and kind == "shuffled" else real
                assert torch.equal(mask.any(1), rows)
    assert lone >= 2  # of 21 training and of 5 held-out rows one is left over


def test_a_run_s_shuffled_last_row_adds_nothing_to_the_kv_loss(rank_server: Any, tmp_path: Any) -> None:
    """Five rows, two a step: the third step of each epoch has a row without a partner."""
    make_models(tmp_path)
    settings = {"teacher_kv": "shuffled", "synthetic_problems": 5, "gradient_accumulation_steps": 1, "max_steps": 4}
    settings |= {"kv_weight": 1.0, "kv_weight_schedule": "constant", "logging_steps": 1, "map_start": "random"}
    codes, log = starter(rank_server, tmp_path)("lone", **settings)
    assert codes == [0], log[-3000:]
    steps = records(tmp_path / "lone")
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert [record["loss/kv"] == 0 for record in steps] == [False, False, True, False]
    assert steps[2]["loss/task"] > 1 and steps[2]["loss/total"] == pytest.approx(steps[2]["loss/task"])
