"""Plans: what jobs they make in which order, what identifies a job, what is wrong with a plan."""

import textwrap
from pathlib import Path

import pytest

from kvds.errors import InputError
from kvds.experiment.plan import load_plan, load_tuned, parse_seeds, save_tuned

PLAN = """
base: base.yaml
settings: {lr: 1e-3}
primary: auc/exact_match
seeds: 0-1
tuning_seeds: [7]
baseline: task
comparisons: [[shuffled, flat]]
prepare:
  start: {alignment_mode: none, max_steps: 3, seed: 9}
arms:
  task: {alignment_mode: none, tune: [{lr: 1e-3}, {lr: 2e-3}]}
  flat: {alignment_mode: flat, student_name: "prepared:start", tune: [{kv_weight: 1}, {kv_weight: "auto:2.0"}]}
  shuffled: {alignment_mode: flat, teacher_kv: shuffled, tuned_as: flat}
"""


def write(folder: Path, text: str = PLAN) -> Path:
    (folder / "base.yaml").write_text("model_name: gpt2\nbatch_size: 4\nlr: 0.5\n")
    (folder / "plan.yaml").write_text(textwrap.dedent(text))
    return folder / "plan.yaml"


def test_reported_jobs_go_seed_by_seed_and_take_the_chosen_values(tmp_path):
    plan = load_plan(write(tmp_path))
    jobs = plan.report_jobs({"task": {"lr": 0.002}, "flat": {"kv_weight": "auto:2.0"}})
    assert [(job.seed, job.arm) for job in jobs] == [(s, a) for s in (0, 1) for a in ("task", "flat", "shuffled")]
    task, flat, shuffled = (job.settings for job in jobs[3:])
    assert task == {"model_name": "gpt2", "batch_size": 4, "lr": 0.002, "alignment_mode": "none", "seed": 1}
    assert flat["kv_weight"] == shuffled["kv_weight"] == "auto:2.0" and shuffled["teacher_kv"] == "shuffled"
    assert flat["lr"] == 1e-3  # the plan's, over the recipe's
    assert plan.pairs == [("flat", "task"), ("shuffled", "task"), ("shuffled", "flat")]


def test_an_arm_may_have_fewer_seeds_and_a_reference_of_its_own(tmp_path):
    plan = load_plan(write(tmp_path, PLAN.replace("tuned_as: flat", "tuned_as: flat, seeds: [1], versus: [flat]")))
    jobs = plan.report_jobs({"task": {}, "flat": {}})
    assert [(job.seed, job.arm) for job in jobs] == [
        (0, "task"), (0, "flat"), (1, "task"), (1, "flat"), (1, "shuffled"),
    ]  # fmt: skip
    assert plan.pairs == [("flat", "task"), ("shuffled", "flat")]


def test_tuning_jobs_are_balanced_and_unreported(tmp_path):
    plan = load_plan(write(tmp_path))
    jobs = plan.tuning_jobs()
    assert [(job.arm, job.variant, job.seed) for job in jobs] == [
        ("task", 0, 7), ("flat", 0, 7), ("task", 1, 7), ("flat", 1, 7),
    ]  # fmt: skip
    assert [job.settings.get("kv_weight") for job in jobs] == [None, 1, None, "auto:2.0"]
    assert len({job.key for job in jobs}) == 4
    with pytest.raises(InputError, match="arm task: no tuned value of task.*--tune"):
        plan.report_jobs({})


def test_a_job_is_what_its_settings_say(tmp_path):
    chosen = {"task": {"lr": 0.002}, "flat": {"kv_weight": 1}}
    first = load_plan(write(tmp_path)).report_jobs(chosen)
    elsewhere = load_plan(write(tmp_path), {"data_dir": str(tmp_path)}).report_jobs(chosen)
    assert [job.key for job in elsewhere] == [job.key for job in first]
    other = load_plan(write(tmp_path, PLAN.replace("lr: 1e-3}\n", "lr: 1e-3, epochs: 5}\n", 1))).report_jobs(chosen)
    assert not {job.key for job in other} & {job.key for job in first}
    # Another prepared run makes another run of what builds on it, and of nothing else.
    prepared = load_plan(write(tmp_path, PLAN.replace("max_steps: 3", "max_steps: 4"))).report_jobs(chosen)
    assert {a.arm for a, b in zip(first, prepared, strict=True) if a.key != b.key} == {"flat"}
    assert load_plan(write(tmp_path)).preparation_jobs()[0].seed == 9


def test_chosen_values_come_back_as_they_were(tmp_path):
    chosen = {"flat": {"kv_weight": "auto:2.0", "datasets": ("gsm8k",)}, "task": {"lr": 0.002}}
    save_tuned(tmp_path / "tuned.yaml", chosen, "two\nlines")
    assert load_tuned(tmp_path / "tuned.yaml") == chosen
    assert (tmp_path / "tuned.yaml").read_text().startswith("# two\n# lines\n")


@pytest.mark.parametrize(("text", "seeds"), [("0-2", (0, 1, 2)), ("4", (4,)), ("0,5-6", (0, 5, 6)), ([3, 1], (3, 1))])
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("primary: auc/exact_match\n", "", "primary is missing"),
        ("primary:", "primry:", "unknown key primry, did you mean primary"),
        ("seeds: 0-1", "seeds: many", "seeds=many: expected whole numbers"),
        ("seeds: 0-1", "seeds: [0, 0]", "seeds="),
        ("tuning_seeds: [7]", "tuning_seeds: [1]", "tuning_seeds: 1 is reported"),
        ("tuning_seeds: [7]", "better: higher", "tuning_seeds is missing"),
        ("baseline: task", "baseline: tsk", "baseline tsk, did you mean task"),
        ("[shuffled, flat]", "[shuffled]", "expected pairs of arms"),
        ("[shuffled, flat]", "[shuffled, structured]", "comparisons structured"),
        ("tuned_as: flat", "seeds: 1-2", "arms.shuffled.seeds: 2: expected some of the plan's"),
        ("tuned_as: flat", "versus: fat", "comparisons fat, did you mean flat"),
        ("[{lr: 1e-3}, {lr: 2e-3}]", "[{lr: 1e-3}]", "task tunes over 1 values, flat over 2; expected equal numbers"),
        ("tuned_as: flat", "tuned_as: shuffled", "tuned_as shuffled"),
        ("prepared:start", "prepared:begin", "flat: prepared: begin"),
        ("teacher_kv: shuffled", "teacher_kv: rolled", "arms.shuffled: teacher_kv=rolled: expected one of"),
        ("teacher_kv: shuffled", "kv_budget: 4", "arm shuffled: kv_budget=4: expected no budget"),
        ("settings: {lr: 1e-3}", "settings: {seed: 1}", "seed=1: expected no seed here"),
        ("settings: {lr: 1e-3}", "settings: {bath_size: 1}", "unknown key bath_size, did you mean batch_size"),
        ("arms:\n", "arms:\n  a/b: {}\n", "a/b: expected a name"),
        ("base: base.yaml", "base: no.yaml", "no.yaml: No such file"),
        ("better", "better", ""),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(tmp_path, old, new, message):
    if not message:
        text, message = PLAN + "better: best\n", "better=best: expected higher or lower"
    else:
        assert old in PLAN
        text = PLAN.replace(old, new, 1)
    with pytest.raises(InputError) as error:
        load_plan(write(tmp_path, text))
    assert message in str(error.value) and "\n" not in str(error.value)
