"""``kvds plan`` as a user calls it: what does not fit, what helps, what is refused."""

import re

import pytest

from kvds.cli import main
from kvds.plan.estimate import Machine, RunPlan
from kvds.plan.phases import GENERATION, TRAINING, Phases
from tests.harness.plan_recipe import config


def test_what_does_not_fit_is_changed_into_what_does(recipe, capsys):
    """The advice, put into the recipe, fits; without it, it does not."""
    wide = ["--set", "batch_size=16", "datasets=synthetic"]
    assert main(["plan", str(recipe), "--gpus", "2", "--gpu-memory", "9GiB", *wide]) == 1
    lines = capsys.readouterr().out.splitlines()
    advice = [line.strip().replace(": ", "=") for line in lines[lines.index("does not fit; in the recipe:") + 1 :]]
    assert advice
    settings = dict(line.split("=") for line in advice)
    cfg = config(recipe, **{"batch_size": 16, **settings})
    assert RunPlan(cfg, Machine(2, 1, 9 * 2**30)).fits
    assert cfg.batch_size * cfg.gradient_accumulation_steps == 16


def test_lines_come_before_the_search_for_rows_that_fit(recipe, capsys, monkeypatch):
    told = []
    search = RunPlan.largest_rows
    monkeypatch.setattr(RunPlan, "largest_rows", lambda plan: told.append(capsys.readouterr().out) or search(plan))
    assert main(["plan", str(recipe), "--set", "datasets=synthetic"]) == 0
    assert "peak in training" in told[0] and "per micro-batch that fit" in told[0]
    assert "teacher replicated" in capsys.readouterr().out


def test_nothing_helps_on_a_tiny_gpu(recipe, capsys):
    assert main(["plan", str(recipe), "--gpu-memory", "1GiB"]) == 1
    assert "no setting here would make it; expected more GPUs" in capsys.readouterr().out


def test_a_whole_student_has_to_fit_for_evaluation(recipe, capsys):
    long = Phases(RunPlan(config(recipe, max_new_tokens=8000), Machine(8, 1, 80 * 2**30)))
    assert long.largest == GENERATION and not long.tight
    training, generation = long.peaks[TRAINING], long.peaks[GENERATION]
    between = int(((training + generation) / 2 + 2**30) / 0.95)
    assert not Phases(RunPlan(config(recipe, max_new_tokens=8), Machine(8, 1, between))).tight
    size = ["--gpus", "8", "--gpu-memory", f"{between}B"]
    assert main(["plan", str(recipe), *size, "--set", "max_new_tokens=8000"]) == 1
    told = capsys.readouterr().out
    assert "evaluation, generation does not fit: each GPU holds a whole student" in told and told.endswith(
        "\ntraining fits\n"
    )


def test_without_the_data_rows_are_assumed(recipe, capsys, tmp_path):
    missing = ["--set", "datasets=gsm8k", f"data_dir={tmp_path}"]
    assert main(["plan", str(recipe), *missing]) == 0
    text = capsys.readouterr().out
    assert "every row taken as --max_length 64 tokens" in text and "work: unknown without rows (--rows N)" in text
    assert main(["plan", str(recipe), "--rows", "400", *missing]) == 0
    assert re.search(r"per epoch \(student .*\), 100 steps", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "-1"], "--gpus, --nodes, --rows: expected"),
        (["--gpu-memory", "80 apples"], "--gpu-memory 80 apples: expected a size such as 80GiB"),
        (["--utilization", "2"], "a share in (0, 1]"),
        (["--set", "batch_size"], "--set batch_size: expected KEY=VALUE"),
        (["--set", "handoff_weight=1", "handoff_source_layers=40"], "--handoff_source_layers 40: expected 1 to 28"),
        (["--set", "batchsize=1"], "unknown flag --batchsize"),
        (["--set", "student_name=./nowhere"], "student_name=./nowhere"),
    ],
)
def test_bad_input(recipe, capsys, arguments, message):
    assert main(["plan", str(recipe), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_layers_of_pretrained_weights_are_refused_as_training_refuses_them(recipe, capsys):
    layers = ["--set", "student_config_overrides=num_hidden_layers=4"]
    assert main(["plan", str(recipe), *layers]) == 2
    told = capsys.readouterr().err
    assert "--student_name=" in told and "num_hidden_layers=4 for pretrained weights of 24 layers" in told
    assert main(["plan", str(recipe), *layers, "student_init=random"]) == 0


def test_several_teachers_are_refused(recipe, capsys):
    recipe.write_text(
        recipe.read_text().replace("teacher_name: ", "teacher_names: [gpt2, ").replace("teacher\n", "teacher]\n")
    )
    assert main(["plan", str(recipe)]) == 2
    assert "kvds plan knows runs of one teacher; expected --teacher_name" in capsys.readouterr().err
