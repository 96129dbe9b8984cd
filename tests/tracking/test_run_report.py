"""The report says what the run folders hold: values checked, gaps shown as dashes, foreign folders refused."""

import csv
import json
import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from kvds.errors import InputError
from kvds.tracking.run_report import format_table, read_runs, save_curves, table_rows, write_report

MIB = 2**20


def make_run(folder: Path, *, lines: list[dict], settings: str | None = None, held_out: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if settings is not None:
        (folder / "config.yaml").write_text(settings)
    if held_out is not None:
        (folder / "eval.json").write_text(json.dumps({"all": held_out}))
    return folder


def steps(count: int, **extra: float) -> list[dict]:
    return [
        {
            "step": 10 * n, "loss/task": 3.0 / n, "perf/tokens_per_second": 1.0 if n == 1 else 1000.0 * n,
            "perf/peak_memory_bytes": (100 + n) * MIB, **extra,
        }
        for n in range(1, count + 1)
    ]  # fmt: skip


def test_row_holds_the_run_s_numbers(tmp_path):
    held_out = {"cross_entropy": 0.12345, "exact_match": 0.625, "kv_loss": 0.5, "samples": 200}
    settings = "alignment_mode: structured\nmap_proj_share_dim: true\nkv_method: right_crop\nkv_budget: 64\n"
    run = make_run(tmp_path / "first", lines=steps(4), settings=settings, held_out=held_out)
    _, row = table_rows(read_runs([run]))
    # The median of 2000, 3000 and 4000: the first interval (warm-up) is left out.
    assert row == ["first", "structured, shared dim, right_crop 64", "0.1235", "62.5", "0.5000", "3,000", "104"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("alignment_mode: flat\nkv_method: full\n", "flat"),
        ("alignment_mode: none\n", "none"),
        ("alignment_mode: flat\nkv_weight: 0\n", "none"),
        ("seed: 1\n", "–"),
    ],
)
def test_alignment_as_the_settings_say(tmp_path, settings, expected):
    run = make_run(tmp_path / "run", lines=steps(1), settings=settings)
    assert table_rows(read_runs([run]))[1][1] == expected


def test_missing_pieces_are_dashes(tmp_path):
    bare = make_run(tmp_path / "bare", lines=[])
    broken_loss = {"cross_entropy": math.nan, "exact_match": 0.0}
    begun = make_run(tmp_path / "begun", lines=steps(1), settings="alignment_mode: none\n", held_out=broken_loss)
    _, first, second = table_rows(read_runs([bare, begun]))
    assert first == ["bare", "–", "–", "–", "–", "–", "–"]
    assert second == ["begun", "none", "–", "0.0", "–", "–", "101"]


def test_table_is_markdown_and_aligned(tmp_path):
    runs = read_runs([make_run(tmp_path / "a|b", lines=steps(2)), make_run(tmp_path / "long_name", lines=steps(3))])
    lines = format_table(runs).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4
    assert lines[0].startswith("| run       | alignment |") and set(lines[1]) <= set("|-: ")
    assert lines[2].startswith("| a\\|b      | ") and lines[2].replace("\\|", "").count("|") == 8


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / parent / "run", lines=steps(1)) for parent in ("x", "y")]
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["x/run (1)", "y/run", "x/run (2)"]


def test_report_and_figure_are_written(tmp_path):
    matches = [{"step": 20, "eval/all/exact_match": 0.2}, {"step": 50, "eval/all/exact_match": 0.4}]
    lines = [*steps(5, **{"loss/kv": 0.5}), *matches]
    with_kv = make_run(tmp_path / "with_kv", lines=lines)
    without = make_run(tmp_path / "without", lines=[*steps(5), {"step": 60, "loss/task": None}])
    written = write_report([with_kv, without], tmp_path / "deep" / "report")
    assert [path.name for path in written] == ["report.md", "loss_curves.png", "report.csv"]
    text = written[0].read_text()
    assert text.startswith("# 2 runs\n") and format_table(read_runs([with_kv, without])) in text
    assert "![Loss curves](loss_curves.png)" in text
    three = imread(written[1])
    one = imread(write_report([without], tmp_path / "one")[1])
    # Panels: task loss, KV loss, exact match; the run without alignment has the first alone.
    assert three.shape[1] == 3 * one.shape[1]
    assert three.std() > 0.05


def test_a_report_says_what_it_was_made_with(tmp_path):
    held_out = {"cross_entropy": 0.5, "exact_match": 0.25, "kv_loss": 2.0}
    told = make_run(tmp_path / "told", lines=steps(4), settings="alignment_mode: flat\n", held_out=held_out)
    facts = {
        "git_revision": "0123abc+changes",
        "torch": "2.13.0",
        "command": "launch/distill.py --seed 1 --name 'a, b'",
    }
    (told / "provenance.json").write_text(json.dumps(facts))
    silent = make_run(tmp_path / "silent", lines=steps(1))
    report, _, table = write_report([told, silent], tmp_path / "out")
    assert "- told: git_revision 0123abc+changes, torch 2.13.0\n  `launch/distill.py --seed 1" in report.read_text()
    assert "- silent" not in report.read_text()
    with table.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert facts.items() <= first.items() and first["alignment"] == "flat" and first["real tokens/s"] == "3000"
    assert first["exact match %"] == "25.0" and first["KV loss (held-out)"] == "2.0000"
    assert second["torch"] == second["real tokens/s"] == "" and second["run"] == "silent"


def test_same_numbers_same_picture(tmp_path):
    runs = read_runs([make_run(tmp_path / "run", lines=steps(3))])
    for name in ("a.png", "b.png"):
        save_curves(runs, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    "lines", [[], [{"step": 1, "loss/task": 0.0}], [{"step": 1, "loss/task": None, "loss/kv": -1.0}]]
)
def test_odd_series_still_draw(tmp_path, lines):
    figure = write_report([make_run(tmp_path / "run", lines=lines)], tmp_path / "out")[1]
    assert imread(figure).size > 0


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", "nonsense\n", r"metrics\.jsonl:1: expected"),
        ("eval.json", "{", r"eval\.json: not readable"),
        ("eval.json", "[1]", r"eval\.json: holds a list"),
        ("eval.json", '{"all": 3}', r'eval\.json: "all" holds no numbers'),
        ("config.yaml", "a: [1", r"config\.yaml: not readable"),
    ],
)
def test_a_broken_file_is_named(tmp_path, file, content, message):
    run = make_run(tmp_path / "run", lines=steps(1))
    (run / file).write_text(content)
    with pytest.raises(InputError, match=message):
        write_report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_no_run_wrote_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_runs([tmp_path / "missing"])
    with pytest.raises(InputError, match=r"holds no metrics\.jsonl"):
        read_runs([tmp_path])
    with pytest.raises(InputError, match="at least one"):
        read_runs([])


def test_an_output_that_is_a_file_is_refused(tmp_path):
    run = make_run(tmp_path / "run", lines=steps(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output .*file"):
        write_report([run], tmp_path / "file")
