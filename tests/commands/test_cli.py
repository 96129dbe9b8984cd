"""``kvds``: commands do what their files say, faults of the user are one line and exit status 2, imports are lazy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import kvds.checkpoint.loading
import kvds.cli
from kvds.align import aligner_config_dict, build_aligner
from kvds.checkpoint.aligner_file import save_aligner
from kvds.cli import COMMANDS, main
from kvds.config.settings import AlignmentSettings
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.kv import KVShape


def tiny_config(vocab_size: int, layers: int = 2) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab_size, num_hidden_layers=layers, hidden_size=16, intermediate_size=32, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    train_problem_tokenizer(folder)
    torch.manual_seed(0)
    config = tiny_config(len(AutoTokenizer.from_pretrained(folder)))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must fail, and return its one line on stderr."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("kvds: error: ")
    return captured.err.removeprefix("kvds: error: ").strip()


# -- the table of commands ---------------------------------------------------------------------------------------------


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in COMMANDS)
    assert main([]) == 2


def test_unknown_command_names_the_nearest(capsys):
    assert "unknown command reprot; did you mean report?" in error_of(capsys, "reprot")
    assert f"expected one of {', '.join(sorted(COMMANDS))} (" in error_of(capsys, "zzz")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("eval",), "the following arguments are required: --model"),
        (("eval", "--model", "x", "--batchsize", "3"), "unknown flag --batchsize, did you mean --batch_size?"),
        (("eval", "--model", "x", "--batch_size", "many"), "argument --batch_size: invalid int value: 'many'"),
        (("eval", "--model", "no/such"), "--model no/such: no such folder"),
        (("eval", "--model", "x", "--max_length", "0"), "--max_length 0: expected at least 1"),
        (("eval", "--model", "x", "--subset_size", "-1"), "--subset_size -1: expected"),
        (("export", "--run", "no/such", "--output", "out"), "no/such: no such folder"),
        (("profile",), "expected --run DIR, or --teacher_name and --student_name"),
        (("profile", "--run", "no/such"), "--run no/such: no such folder"),
        (("profile", "--run", "x", "--student_name", "y"), "not both"),
        (("profile", "--run", "x", "--fit_rows", "-1"), "--fit_rows -1: expected at least 0"),
        (
            ("profile", "--student_name", "y", "--fit_rows", "3"),
            "--fit_rows 3: expected at least 0, and with --run DIR",
        ),
        (("profile", "--student_name", "./no"), "--student_name=./no: no such folder"),
        (("report", "--output", "out"), "no run folder is given"),
        (("report", "no/such", "--output", "out"), "no/such: no such folder"),
    ],
)
def test_faults_of_the_user_are_one_line(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(capsys, name):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0 and f"kvds {name}" in capsys.readouterr().out


def test_as_a_module_and_without_heavy_imports(tmp_path):
    script = (
        "import sys; from kvds.cli import main; status = main(['report', 'missing', '--output', 'out'])\n"
        "print(status, sorted({'torch', 'transformers', 'deepspeed', 'mlflow', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "2 []\n", done.stderr
    done = subprocess.run([sys.executable, "-m", "kvds.cli", "evl"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "did you mean eval?" in done.stderr


PLAN = "settings: {model_name: gpt2}\nprimary: auc/x\nseeds: 0-999\nbaseline: a\narms: {a: {}, b: {lr: 1.0}}\n"


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["--help"], 141),
        (["--version"], 141),
        (["report", "--help"], 141),
        (["ab", "plan.yaml", "--dry_run"], 141),
    ],
)
@pytest.mark.parametrize("both", [False, True])
def test_a_reader_that_has_gone_is_no_error(tmp_path, argv, status, both, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # argparse swallows what an unbuffered stream says of it
    (tmp_path / "plan.yaml").write_text(PLAN)
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "kvds.cli", *argv], stdout=writing, stderr=writing if both else subprocess.PIPE,
        cwd=tmp_path, text=True,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == status and not done.stderr


def test_a_reader_that_leaves_midway_is_no_error(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    command = [sys.executable, "-m", "kvds.cli", "ab", "plan.yaml", "--dry_run"]  # more than a pipe takes in
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, text=True)
    assert process.stdout.readline() == "to do  plan/report-a-seed0\n"
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (141, "")


def test_another_pipe_that_breaks_is_told(monkeypatch):
    def broken(*_: object) -> int:
        raise BrokenPipeError("a socket")

    monkeypatch.setattr(kvds.cli, "_run", broken)
    with pytest.raises(BrokenPipeError, match="a socket"):
        main(["report"])


# -- the commands ------------------------------------------------------------------------------------------------------


def test_eval_prints_and_writes_the_numbers(capsys, tmp_path, model_folder):
    output = tmp_path / "out"
    argv = [
        "eval",
        "--model",
        str(model_folder),
        "--subset_size",
        "6",
        "--max_new_tokens",
        "4",
        "--output",
        str(output),
    ]
    assert main(argv) == 0
    results = json.loads((output / "eval.json").read_text())
    assert set(results) == {"synthetic", "all"} and results["all"]["samples"] == 6
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header[0] == "corpus"
    for name in ("synthetic", "all"):
        loss, perplexity, match, samples, judged, cut = results[name].values()
        assert samples == judged == 6 and 0 < cut <= 6
        assert [name, f"{loss:.4f}", f"{perplexity:.3f}", f"{100 * match:.1f}", str(cut), "6"] in rows
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 6


def test_eval_keeps_to_the_model_s_positions(capsys, tmp_path, model_folder):
    """Without --max_length as many as the model has, or 512; rows that do not fit are no traceback."""
    folder = tmp_path / "few"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 36}))
    argv = ("eval", "--model", str(folder), "--subset_size", "60", "--max_new_tokens", "4", "--output", str(tmp_path))
    assert main(list(argv)) == 0
    assert 0 < json.loads((tmp_path / "eval.json").read_text())["all"]["samples"] < 60
    capsys.readouterr()
    told = error_of(capsys, *argv, "--max_length", "37")
    assert told == "max_length=37: the model has 36 positions; expected --max_length 36 or less"
    (tmp_path / "eval.json").unlink()
    assert "--max_length 3: none of the 60 held-out rows fits" in error_of(capsys, *argv, "--max_length", "3")
    assert not (tmp_path / "eval.json").exists()


def test_eval_refuses_rows_that_the_tokenizer_cannot_write(capsys, tmp_path, model_folder):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"prompt": "$5.00?", "answer": "1"}))
    (tmp_path / "own.eval.jsonl").write_text(path.read_text())
    argv = ("eval", "--model", str(model_folder), "--datasets", str(path), "--max_new_tokens", "1")
    told = error_of(capsys, *argv)
    assert "max_lossy_rows=0.05: " in told and "'$5.00?\\n' becomes '500?\\n'" in told
    assert main([*argv, "--max_lossy_rows", "1"]) == 0
    capsys.readouterr()
    assert "expected a share from 0 to 1" in error_of(capsys, *argv, "--max_lossy_rows", "2")


def test_eval_refuses_folders_that_hold_something_else(capsys, tmp_path, model_folder):
    assert "holds no loadable tokenizer" in error_of(capsys, "eval", "--model", str(tmp_path))
    argv = ("eval", "--model", str(tmp_path), "--tokenizer", str(model_folder), "--subset_size", "1")
    assert f"--model={tmp_path}: the folder holds no loadable config.json" in error_of(capsys, *argv)
    AutoModelForCausalLM.from_config(tiny_config(7)).save_pretrained(tmp_path)
    capsys.readouterr()
    assert "--model: vocab_size 7 has no row for token id" in error_of(capsys, *argv)


def test_code_in_a_model_folder_is_never_run(capsys, tmp_path, model_folder, monkeypatch):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "foreign", "auto_map": names}))
    (folder / "foreign.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    argv = ("eval", "--model", str(folder), "--tokenizer", str(model_folder), "--subset_size", "1")
    assert "the folder holds no loadable config.json" in error_of(capsys, *argv)
    assert not ran.exists()


def test_export_hands_its_arguments_on(capsys, tmp_path, monkeypatch):
    calls = []

    def export_checkpoint(run: Path, step: int | None, output: Path) -> Path:
        calls.append((run, step, output))
        (output / "student").mkdir(parents=True)
        return output

    monkeypatch.setattr("kvds.checkpoint.export.export_checkpoint", export_checkpoint)
    (tmp_path / "run").mkdir()
    assert main(["export", "--run", str(tmp_path / "run"), "--step", "20", "--output", str(tmp_path)]) == 0
    assert calls == [(tmp_path / "run", 20, tmp_path)]
    assert str(tmp_path / "student") in capsys.readouterr().out


def test_profile_of_a_run_shows_what_its_aligner_learned(capsys, tmp_path):
    student, teacher = KVShape(2, 2, 4, 4), KVShape(3, 2, 8, 4)
    aligner = build_aligner(student, teacher, AlignmentSettings(kv_parts="k"))
    (part,) = aligner.parts.values()
    with torch.no_grad():
        part.layer_logits.copy_(torch.tensor([[0.0, 0.0], [0.0, 40.0], [40.0, 0.0]]))
    save_aligner(aligner_config_dict(aligner), aligner.state_dict(), tmp_path / "map_aligner.pt")
    assert main(["profile", "--run", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    total = sum(parameter.numel() for parameter in aligner.parameters())
    assert f"alignment structured, student_to_teacher, {total:,} parameters" in text
    assert "student: 2 layers, 2 KV heads of 4" in text and "teacher: 3 layers, 2 KV heads of 8" in text
    rows = [line.split() for line in text.splitlines() if line.strip()[:2] in ("0:", "1:", "2:")]
    # Row 0 is even between two sources (ln 2 nats), the others are sure of one.
    assert [row[0] for row in rows] == ["0:", "1:", "2:"] and [row[1] for row in rows][1:] == ["1", "0"]
    assert [row[2] for row in rows] == ["0.693", "0.000", "0.000"]
    assert imread(tmp_path / "aligner.png").std() > 0.05
    assert imread(tmp_path / "aligner_spectrum.png").std() > 0.02
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert profile["parameters"] == total and profile["fit"] == {}
    # Semi-orthogonal at the start: every map of every layer and head passes on all four directions alike.
    assert profile["spectra"]["key"]["directions"] == pytest.approx([4.0] * 3 * 2, rel=1e-5)


def test_profile_of_a_pair_counts_parameters_by_mode(capsys, tmp_path):
    for name, layers in (("student", 2), ("teacher", 3)):
        tiny_config(32, layers).save_pretrained(tmp_path / name)
    argv = ["profile", "--student_name", str(tmp_path / "student"), "--teacher_name", str(tmp_path / "teacher"),
            "--teacher_config_overrides", "num_hidden_layers=4", "--alignment_mode", "flat",
            "--kv_parts", "kv"]  # fmt: skip
    assert main(argv) == 0
    text = capsys.readouterr().out
    # KV width 2 · 4 on both sides; per part: 2 pairs of layers, each a square map and a bias.
    flat = 2 * 2 * (8 * 8 + 8)
    # Per part and teacher layer: layer logits 2, head mix 2 x 2, dimension maps 4 x 4 per head, bias 8.
    structured, shared = 2 * 4 * (2 + 4 + 2 * 16 + 8), 2 * (4 * 2 + 4 + 16 + 4 * 8)
    indented = [line for line in text.splitlines() if line.startswith("  ")]
    found = {line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in indented}
    assert found["flat"] == f"{flat:,}"
    assert found["structured"] == f"{structured:,}" and found["structured, share_dim"] == f"{shared:,}"
    assert "layers paired (student, teacher): 0-0 1-3" in text and "written:" not in text


def test_report_prints_the_table(capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss/task": 2.0, "perf/peak_memory_bytes": 1048576}\n')
    assert main(["report", str(run), "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[2].split("|")[1:3] == [" run ", " –         "] and "loss_curves.png" in text
    assert (tmp_path / "out" / "report.md").is_file()
