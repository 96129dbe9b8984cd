"""``kvds handoff fit|eval|export`` as a user calls it, on the built-in teacher, whose student is the teacher itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvds.cli import main
from kvds.data.example import answer_text, extract_answer
from kvds.data.synthetic import synthetic_examples
from kvds.evaluation.handoff import CONDITIONS
from kvds.handoff import load_handoff
from kvds.models.weights_identity import weights_identity

REPOSITORY = Path(__file__).resolve().parents[2]
TEACHER = REPOSITORY / "launch/quickstart_teacher"


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A student with its map beside it."""
    folder = tmp_path_factory.mktemp("pair") / "student"
    shutil.copytree(TEACHER, folder)
    before = weights_identity(str(folder), init="pretrained", seed=0, flag="--student")
    assert main(["handoff", "fit", "--teacher", str(TEACHER), "--student", str(folder), "--rows", "48"]) == 0
    assert weights_identity(str(folder), init="pretrained", seed=0, flag="--student") == before
    AutoModelForCausalLM.from_pretrained(folder)  # a map beside it is no part of the model
    return folder


def error_of(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main(["handoff", *argv]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kvds: error: ")]
    return line


def test_the_files_say_what_the_map_is_and_was_fitted_to(student):
    content = json.loads((student / "handoff.json").read_text())
    assert content["format"] == 1 and content["sources"] == [[0, 1, 2, 3]] * 4
    assert content["teacher"] == content["student"] and content["teacher"]["head_dim"] == 32
    identity = content["identity"]
    assert identity["teacher weights"] == identity["student weights"] and "entries" in identity["tokenizer"]
    assert content["fit"]["corpora"] == ["synthetic"] and content["fit"]["prompts"] == 48
    assert min(content["fit"]["r2"]["values"]) > 0.9
    weights = load_file(student / "handoff.safetensors")
    assert {name: tuple(t.shape) for name, t in weights.items()} == {
        "key_weight": (4, 256, 64), "key_bias": (4, 64), "value_weight": (4, 256, 64), "value_bias": (4, 64),
    }  # fmt: skip


def test_evaluation_tells_a_handoff_from_wrong_caches(student, tmp_path, capsys):
    """Own and mapped agree, each wrong cache hurts; a second domain is a column of its own."""
    problems = synthetic_examples("eval", problems=1, seed=0)
    rows = [{"prompt": e.prompt, "rationale": e.rationale, "answer": e.answer} for e in problems[100:112]]
    other = tmp_path / "other.jsonl"
    for name in ("other.jsonl", "other.eval.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--subset_size", "12", "--datasets", "synthetic", str(other), "--output", str(tmp_path / "out")]
    flags += ["--max_new_tokens", "32"]
    assert main(["handoff", "eval", "--teacher", str(TEACHER), "--student", str(student), *flags]) == 0
    printed = capsys.readouterr().out
    assert "no evidence" not in printed and "(other text): exact match %" in printed and "another row's" in printed
    found = json.loads((tmp_path / "out/handoff_eval.json").read_text())
    results = found["results"]
    assert list(results) == list(CONDITIONS) and set(results["own"]) == {"synthetic", "other", "all"}
    assert results["own"]["all"]["exact_match"] == 1 and results["mapped"]["all"]["exact_match"] > 0.9
    for wrong in ("another", "shuffled", "zeros", "none"):
        assert results[wrong]["all"]["exact_match"] < 0.3
        assert results[wrong]["all"]["cross_entropy"] > 2 * results["mapped"]["all"]["cross_entropy"]
    assert results["own"]["all"]["attention_error"] < 1e-8 and results["none"]["all"]["attention_error"] is None
    assert results["mapped"]["all"]["attention_error"] < 0.2 * results["zeros"]["all"]["attention_error"]
    assert found["wrong_caches_hurt"] == dict.fromkeys(("another", "shuffled", "zeros", "none"), True)
    assert (tmp_path / "out/handoff_eval.md").read_text() in printed
    assert (tmp_path / "out/handoff_eval.png").read_bytes()[:4] == b"\x89PNG"


def test_a_map_that_carries_nothing_is_told(student, tmp_path, capsys):
    """Its bias alone: an answer without the prompt. Wrong caches do no more harm, and the output says so."""
    empty = tmp_path / "empty"
    shutil.copytree(student, empty)
    weights = load_file(empty / "handoff.safetensors")
    save_file(
        {n: torch.zeros_like(t) if "weight" in n else t for n, t in weights.items()}, empty / "handoff.safetensors"
    )
    flags = ["--subset_size", "8", "--output", str(tmp_path / "out"), "--max_new_tokens", "24"]
    assert main(["handoff", "eval", "--teacher", str(TEACHER), "--student", str(empty), *flags]) == 0
    assert "no evidence of a handoff: with a cache that is wrong (another, shuffled" in capsys.readouterr().out


def test_python_interface_answers_with_the_teachers_cache(student):
    handoff = load_handoff(str(TEACHER), str(student))
    tokenizer = AutoTokenizer.from_pretrained(student, padding_side="left")
    examples = synthetic_examples("eval", problems=1, seed=0)[:6]
    inputs = tokenizer([f"{e.prompt}\n" for e in examples], return_tensors="pt", padding=True)
    written = handoff.generate(inputs.input_ids, inputs.attention_mask, max_new_tokens=32, do_sample=False)
    texts = tokenizer.batch_decode(written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    right = [extract_answer(t) == extract_answer(answer_text(e)) for t, e in zip(texts, examples, strict=True)]
    assert sum(right) >= 5


def test_export_is_one_folder_in_the_engines_format(student, tmp_path):
    assert main(["handoff", "export", "--student", str(student), "--output", str(tmp_path / "out")]) == 0
    target = tmp_path / "out/student"
    assert {t.dtype for t in load_file(target / "handoff.safetensors").values()} == {torch.bfloat16}
    assert json.loads((target / "handoff.json").read_text())["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(target).eos_token
    load_handoff(str(TEACHER), str(target))  # knows its pair


def test_training_flags_train_the_map(student, tmp_path, capsys):
    flags = ["--rows", "16", "--source_layers", "1", "--ridge", "1", "--attention_steps", "8", "--answer_steps", "8"]
    flags += ["--lr", "1e-4", "--output", str(tmp_path / "map")]
    assert main(["handoff", "fit", "--teacher", str(TEACHER), "--student", str(student), *flags]) == 0
    fit = json.loads((tmp_path / "map/handoff.json").read_text())["fit"]
    for name in ("attention_steps", "answer_steps"):
        assert fit[name]["steps"] == 8 and fit[name]["last"] < fit[name]["first"]
    assert "attention steps: " in capsys.readouterr().out


def test_faults_are_one_line(student, tmp_path, capsys):
    pair = ["--teacher", str(TEACHER), "--student", str(student)]
    out = ["--output", str(tmp_path / "out")]
    for argv, message in (
        ([], "fit|eval|export"),
        (["fit", "--student", "x"], "required: --teacher"),
        (["fit", *pair, "--rows", "1"], "--rows 1: expected at least 2"),
        (["fit", *pair, "--ridge", "0"], "--ridge 0.0: expected strengths above 0"),
        (["fit", *pair, "--lr", "0"], "--lr 0.0: expected above 0"),
        (["fit", *pair, "--source_layers", "5"], "--source_layers 5: expected 1 to 4"),
        (["fit", *pair, "--max_length", "9"], "expected at least two"),
        (["fit", *pair, "--row", "3"], "unknown flag --row, did you mean --rows?"),
        (["fit", *pair, "--source-layers", "5"], "--source_layers 5: expected 1 to 4"),
        (["fit", "--teacher", str(TEACHER), "--student", "some/hub"], "--student some/hub: no such folder"),
        (["eval", *pair, "--subset_size", "1", *out], "expected at least two"),
        (["eval", "--teacher", str(TEACHER), "--student", str(TEACHER), *out], "has no handoff.safetensors"),
        (["export", "--student", str(student), "--output", str(student / "config.json")], "is a file"),
    ):
        assert message in error_of(capsys, *argv), argv
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_and_another_pair_are_refused_with_a_reason(student, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(TEACHER, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[40:42]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    flags = ["--student", str(student), "--output", str(tmp_path / "out")]
    for action in ("fit", "eval"):
        line = error_of(capsys, action, "--teacher", str(other), *flags)
        assert "another tokenizer cuts the text elsewhere" in line and str(other) in line

    changed = tmp_path / "changed"
    shutil.copytree(TEACHER, changed)
    model = AutoModelForCausalLM.from_pretrained(changed)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    model.save_pretrained(changed)
    assert "was fitted to another teacher weights" in error_of(capsys, "eval", "--teacher", str(changed), *flags)
    (student / "handoff.json").rename(tmp_path / "kept.json")
    try:
        (student / "handoff.json").write_text("{}")
        assert "cannot be read" in error_of(capsys, "eval", "--teacher", str(TEACHER), *flags)
    finally:
        (tmp_path / "kept.json").rename(student / "handoff.json")


def test_rows_of_ones_own_are_read_as_in_training(student, tmp_path, capsys):
    chats = REPOSITORY / "examples/chat"
    pair = ["--teacher", str(TEACHER), "--student", str(student), "--output", str(tmp_path / "map")]
    own = ["--datasets", str(chats / "rows.jsonl"), "--rows", "16", "--source_layers", "1", "--ridge", "1"]
    assert main(["handoff", "fit", *pair, *own, "--chat_template", str(chats / "template.jinja")]) == 0
    assert "fitted to 16 prompts" in capsys.readouterr().out
    assert "has no chat template" in error_of(capsys, "fit", *pair, *own)
    (tmp_path / "rows.csv").write_text("question,reply\n" + "".join(f"Bob has {n} nuts?,{n}\n" for n in range(10, 60)))
    own[1] = str(tmp_path / "rows.csv")
    assert main(["handoff", "fit", *pair, *own, "--columns", "prompt=question,answer=reply"]) == 0
    assert "columns=prompt=nothing" in error_of(capsys, "fit", *pair, *own, "--columns", "prompt=nothing", "auto")
