"""A run goes on with what it was trained on, wherever that lies now, or not at all; a folder is one job's at a time."""

import hashlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from kvds.checkpoint.manifest import FileEntry, file_fault, read_manifest, write_manifest
from kvds.checkpoint.origin import ORIGIN_FILE, Origin
from kvds.checkpoint.run_identity import check_identity
from kvds.config import RunConfig
from kvds.data.synthetic import synthetic_examples
from kvds.errors import InputError
from tests.harness.survival_runs import at_step, check_equal, cut, flags, make_models, records, starter

SHORT = {"max_steps": 4, "save_steps": 2, "logging_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    make_models(folder)
    write_rows(folder / "rows.jsonl")
    return folder


def write_rows(path: Path, *, answer: str | None = None, more: int = 0) -> Path:
    rows = [
        {"prompt": row.prompt, "rationale": row.rationale, "answer": row.answer}
        for row in synthetic_examples("train", problems=16 + more, seed=0)
    ]
    if answer is not None:
        rows[-1]["answer"] = answer
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def start(rank_server, folder):
    begin = starter(rank_server, folder)
    return lambda name, **changes: begin(name, **{"datasets": folder / "rows.jsonl", **SHORT, **changes})


@pytest.fixture(scope="module")
def straight(start, folder) -> Path:
    codes, log = start("straight")
    assert codes == [0], log[-3000:]
    return folder / "straight"


def refusals(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("kvds: error: ")]


def snapshot(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and ".owner" not in p.name}


def changed_weights(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 2] += 0.5
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def other_tokenizer(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    content = json.loads((target / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    # Two pieces of the problems' numbers change places: the same size, the same words.
    vocabulary["3"], vocabulary["4"] = vocabulary["4"], vocabulary["3"]
    (target / "tokenizer.json").write_text(json.dumps(content))
    return target


CHANGES = {
    "other words": (lambda f: {"datasets": write_rows(f / "words.jsonl", answer="77")}, "--datasets=", "training rows"),
    "more rows": (lambda f: {"datasets": write_rows(f / "more.jsonl", more=5)}, "--datasets=", "training rows"),
    "another teacher": (
        lambda f: {"teacher_name": changed_weights(f / "teacher", f / "teacher2")}, "--teacher_name=", "teacher weights"
    ),
    "another student": (
        lambda f: {"student_name": changed_weights(f / "student", f / "student2")}, "--student_name=", "student weights"
    ),
    "another tokenizer": (
        lambda f: {"tokenizer_name": other_tokenizer(f / "tokenizer", f / "other")}, "--tokenizer_name=", "tokenizer"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_another_content_is_refused_and_named(start, straight, folder, what):
    change, flag, part = CHANGES[what]
    run = cut(straight, folder / f"refused {what}", 2)
    before = snapshot(run)
    ranks = 2 if what in ("other words", "another teacher") else 1
    batch = {"batch_size": 2 // ranks}
    codes, log = start(run.name, ranks=ranks, **batch, **change(folder))
    assert codes == [2] * ranks, log[-3000:]
    [line] = refusals(log)
    assert line.startswith(f"kvds: error: {flag}") and f"the {part} now: " in line
    assert f"step-000002 in {run} was trained with: " in line and "--resume never" in line
    assert snapshot(run) == before and "Traceback" not in log


def test_equal_contents_in_other_places_go_on(start, straight, folder):
    run = cut(straight, folder / "moved_run", 2)
    places = {}
    for name in ("teacher", "student", "tokenizer"):
        shutil.copytree(folder / name, folder / "elsewhere" / f"{name} of old")
        places[f"{name}_name"] = folder / "elsewhere" / f"{name} of old"
    shutil.copy(folder / "rows.jsonl", folder / "elsewhere/rows.jsonl")
    os.utime(folder / "elsewhere/rows.jsonl", (1, 1))
    (folder / "elsewhere/rows.jsonl").write_bytes(b"\n" + (folder / "rows.jsonl").read_bytes())  # the same rows
    codes, log = start("moved_run", datasets=folder / "elsewhere/rows.jsonl", **places)
    assert codes == [0] and "resumed from step 2 of 4" in log, log[-3000:]
    check_equal(straight, run)


def test_held_out_rows_may_change_and_that_is_told(start, straight, folder):
    run = cut(straight, folder / "judged", 2)
    codes, log = start("judged", eval_subset_size=2, max_new_tokens=2)
    assert codes == [0] and (run / "student").is_dir(), log[-3000:]
    [told] = [line for line in log.splitlines() if "held-out rows: " in line]
    assert re.search(r"held-out rows: 1 rows \w+ now, 0 rows \w+ up to step-000002: evaluations from here on", told)


@pytest.mark.parametrize(
    ("before", "now", "settings", "hint"),
    [
        ("3 rows a", "2 rows c", {"subset_size": 8}, "; which rows are drawn of a file follows from its name, too"),
        ("3 rows a", "3 rows a", {}, ""),
        ("3 rows a", "3 rows a", {"subset_size": 8, "datasets": ("gsm8k",)}, ""),
    ],
)  # fmt: skip
def test_a_setting_that_draws_other_rows_is_named(before, now, settings, hint):
    """Neither is another content: the remedy is the setting, or the name, that it had."""
    cfg = RunConfig(**{"model_name": "m", "output_dir": "out", "datasets": ("own.jsonl",), **settings})
    origin = Origin(1, 4, 3, {"training rows": "9 rows x", "held-out rows": before})
    with pytest.raises(InputError) as error:
        check_identity(cfg, origin, 2, {"training rows": "12 rows y", "held-out rows": now})
    assert str(error.value).endswith(f"or another --output_dir){hint}")


def test_what_is_not_here_for_a_while_stays_known():
    cfg = RunConfig(model_name="m", output_dir="out")
    before = {"training rows": "9 rows x", "held-out rows": "3 rows a", "teacher weights": "5 bytes t"}
    now = {"training rows": "9 rows x", "held-out rows": "2 rows b"}
    assert check_identity(cfg, Origin(1, 4, 3, before), 2, now) == before | now
    assert check_identity(cfg, Origin(1, 4, 3), 2, now) == now


def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_warning(start, straight, folder):
    run = cut(straight, folder / "of before", 2)
    checkpoint = run / "checkpoints/step-000002"
    origin = json.loads((checkpoint / ORIGIN_FILE).read_text())
    assert {"seed", "tokenizer", "training rows", "teacher weights", "student weights"} <= set(origin.pop("identity"))
    text = json.dumps(origin) + "\n"
    (checkpoint / ORIGIN_FILE).write_text(text)
    files = read_manifest(checkpoint)
    files[ORIGIN_FILE] = FileEntry(len(text), hashlib.sha256(text.encode()).hexdigest())
    write_manifest(checkpoint, files)
    assert file_fault(checkpoint / ORIGIN_FILE, files[ORIGIN_FILE]) is None
    codes, log = start("of before")
    assert codes == [0] and "was saved by an earlier version and does not say of which weights" in log, log[-3000:]
    check_equal(straight, run)


def test_two_jobs_for_one_folder_are_never_mixed(rank_server, folder):
    """Both start at once with seeds of their own; one trains to its end, the other is told of it and leaves nothing."""
    for turn in range(3):
        run = folder / f"raced-{turn}"
        jobs = [
            rank_server.start(
                flags(folder, run, datasets=folder / "rows.jsonl", seed=seed, batch_size=1, **SHORT), ranks=2,
                log=folder / f"raced-{turn}-{seed}.log", setup=at_step(2, "time.sleep(2)"),
            )
            for seed in (turn, turn + 1)
        ]  # fmt: skip
        codes = [job.wait(200) for job in jobs]
        assert sorted(codes) == [[0, 0], [2, 2]], [job.log.read_text()[-2000:] for job in jobs]
        winner, loser = (jobs[codes.index(code)] for code in ([0, 0], [2, 2]))
        [line] = refusals(loser.log.read_text())
        assert f"output_dir={run}: belongs to process {winner.pids[0]} on " in line and "another --output_dir" in line
        seed = (turn, turn + 1)[jobs.index(winner)]
        assert f"seed: {seed}\n" in (run / "config.yaml").read_text()
        saved = [json.loads(p.read_text())["identity"]["seed"] for p in run.glob("checkpoints/*/origin.json")]
        assert saved == [str(seed)] * 2 and not list(run.glob("checkpoints-*"))
        assert [record["step"] for record in records(run)] == [0, 1, 2, 3, 4]  # 0: what the map starts with


def test_a_job_that_was_killed_leaves_its_folder_and_a_stale_mark_to_the_next(start, folder, straight):
    run = folder / "killed"
    run.mkdir()
    (run / "preempted").write_text("SIGTERM arrived\n")
    codes, _ = start("killed", setup=at_step(3, "os.kill(os.getpid(), signal.SIGKILL)"))
    assert codes == [-signal.SIGKILL] and not (run / "preempted").exists()
    (run / "checkpoints/step-000003.unfinished").mkdir()
    begun = time.monotonic()
    codes, log = start("killed")
    assert codes == [0] and "resumed from step 2 of 4" in log and time.monotonic() - begun < 60, log[-3000:]
    assert not (run / "checkpoints/step-000003.unfinished").exists()
    check_equal(straight, run)


def test_a_second_job_touches_nothing_of_a_living_one(rank_server, folder):
    run = folder / "lived_in"
    first = rank_server.start(
        flags(folder, run, datasets=folder / "rows.jsonl", **SHORT), log=folder / "first.log",
        setup=at_step(3, "time.sleep(600)"),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run / "checkpoints/latest").exists():
        assert time.monotonic() < deadline, (folder / "first.log").read_text()[-2000:]
        time.sleep(0.1)
    time.sleep(0.5)
    (run / "preempted").write_text("of the living one\n")
    (run / "checkpoints/step-000004.unfinished").mkdir()
    before = snapshot(run)
    second = rank_server.start(
        flags(folder, run, datasets=folder / "rows.jsonl", resume="never", **SHORT), log=folder / "second.log"
    )
    assert second.wait(100) == [2] and snapshot(run) == before
    assert (run / "checkpoints/step-000004.unfinished").is_dir()
    checked = flags(folder, run, datasets=folder / "rows.jsonl", **SHORT) + ["--dry_run", "true"]
    assert rank_server.start(checked, log=folder / "third.log").wait(100) == [2]
    assert f"belongs to process {first.pids[0]}" in (folder / "third.log").read_text()
    first.kill()


def test_a_dry_run_knows_of_other_contents(rank_server, straight, folder):
    run = cut(straight, folder / "checked", 2)
    rows = write_rows(folder / "checked.jsonl", answer="5")
    for name, code in ((folder / "rows.jsonl", 0), (rows, 2)):
        log = folder / f"checked-{code}.log"
        argv = flags(folder, run, datasets=name, **SHORT) + ["--dry_run", "true"]
        assert rank_server.start(argv, log=log).wait(100) == [code], log.read_text()[-2000:]
    assert "the training rows now: " in log.read_text()


def test_the_tokenizers_of_these_tests_differ_in_meaning_alone(folder, tmp_path):
    other_tokenizer(folder / "tokenizer", tmp_path / "other")
    mine, other = (AutoTokenizer.from_pretrained(path) for path in (folder / "tokenizer", tmp_path / "other"))
    assert len(mine) == len(other) and mine("3").input_ids == other("4").input_ids
