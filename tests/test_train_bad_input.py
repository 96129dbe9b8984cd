"""Faults that only a run can see: exit code 2 and one line that names the value and what to do, before weights are
read.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, T5Config

from kvds.data.tokenizer import train_problem_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent

# Runs distill.py's main() for every case of argv[1] in one process; says for each how it ended and what it loaded.
RUN_ALL = """
import contextlib, importlib.util, io, json, sys, traceback

import kvds.train

spec = importlib.util.spec_from_file_location("distill", "launch/distill.py")
distill = importlib.util.module_from_spec(spec)
spec.loader.exec_module(distill)
load_model, loaded = kvds.train.load_model, []
kvds.train.load_model = lambda name, *args, **kwargs: loaded.append(name) or load_model(name, *args, **kwargs)
results = {}
for case, flags in json.loads(open(sys.argv[1]).read()).items():
    loaded.clear()
    sys.argv = ["distill.py", *flags]
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            code = distill.main()
        except BaseException:
            code = 1
            traceback.print_exc()
    results[case] = {"code": code, "stderr": stderr.getvalue(), "loaded": len(loaded)}
print("RESULTS" + json.dumps(results))
"""


def make_models(folder: Path) -> None:
    train_problem_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    config = Qwen2Config(
        vocab_size=len(tokenizer), num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    other = AutoTokenizer.from_pretrained(folder / "tokenizer")
    other.add_tokens(["<extra>"])
    shutil.copytree(folder / "model", folder / "other_tokenizer")
    other.save_pretrained(folder / "other_tokenizer")
    other = AutoTokenizer.from_pretrained(folder / "tokenizer")
    other.eos_token = None
    other.save_pretrained(folder / "endless")
    T5Config().save_pretrained(folder / "t5")
    (folder / "empty").mkdir()
    for name in ("no_weights", "one_missing", "cut_off"):
        shutil.copytree(folder / "model", folder / name)
    (folder / "no_weights/model.safetensors").unlink()
    weights = load_file(folder / "one_missing/model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "one_missing/model.safetensors", metadata={"format": "pt"})
    whole = (folder / "cut_off/model.safetensors").read_bytes()
    (folder / "cut_off/model.safetensors").write_bytes(whole[:999])


def make_files(folder: Path) -> None:
    row = {"prompt": "Lee has 12 balls?", "rationale": "12", "answer": "12"}
    (folder / "malformed.jsonl").write_text(json.dumps(row) + '\n{"prompt": "x"}\n')
    (folder / "broken.jsonl").write_text(json.dumps(row) + "\n\n{'prompt': 1}\n")
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "single.jsonl").write_text(json.dumps(row))
    (folder / "data/svamp").mkdir(parents=True)
    (folder / "data/svamp/SVAMP.json").write_text('[\n{"ID": "chal-1", "Body": "b", "Question": "q"}\n]')
    ds = json.loads((REPOSITORY / "ds_configs/zero3_cpu.json").read_text())
    (folder / "batch.json").write_text(json.dumps({**ds, "train_batch_size": 7}))
    for name in ("lost", "strange"):
        (folder / name / "checkpoints/step-000003").mkdir(parents=True)
    (folder / "lost/checkpoints/latest").write_text("step-000009")
    (folder / "strange/checkpoints/latest").write_text("step-000003")


# Case → changes to a run that works, and what the message must hold. @ stands for the test's folder.
CASES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "unknown corpus": ({"datasets": "gsm8l"}, ("datasets=gsm8l", "did you mean gsm8k?")),
    "malformed row": ({"datasets": "@/malformed.jsonl"}, ("@/malformed.jsonl:2: 'answer' is missing",
    "--on_bad_row skip")),
    "no JSON": ({"datasets": "@/broken.jsonl"}, ("@/broken.jsonl:3: not JSON", "--on_bad_row skip")),
    "malformed corpus": ({"datasets": "svamp", "data_dir": "@/data"}, ("SVAMP.json:2: 'Answer' is None",
    "expected a number")),
    "empty corpus": ({"datasets": "@/blank.jsonl"}, ("blank.jsonl: no usable row", "expected at least one")),
    "missing corpus": ({"datasets": "gsm8k", "data_dir": "@/data"}, ("gsm8k/train.jsonl: No such file", "--data_dir")),
    "corpus without a network": ({"datasets": "gsm8k"}, ("datasets=gsm8k: openai/gsm8k could not be loaded",
    "--data_dir FOLDER")),
    "one prompt": ({"datasets": "@/single.jsonl", "eval_subset_size": "5"}, ("none can be held out",
    "--eval_subset_size 0")),
    "rows too long": ({"max_length": "9"}, ("20 longer than --max_length 9", "raise --max_length")),
    "too many positions": ({"max_length": "65"}, ("max_length=65", "64 positions", "--max_length 64 or less")),
    "other tokenizer": ({"student_name": "@/other_tokenizer"}, ("--student_name=@/other_tokenizer: its tokenizer",
    "one vocabulary")),
    "tokenizer without an end": ({"tokenizer_name": "@/endless"}, ("no end-of-text token", "--tokenizer_name")),
    "no tokenizer": ({"tokenizer_name": ""}, ("hold no tokenizer", "--tokenizer_name FOLDER")),
    "small vocabulary": (
        {"student_init": "random", "student_config_overrides": "vocab_size=50"}, ("--student_name: vocab_size 50",
        "vocab_size="),
    ),
    "unknown family": ({"teacher_name": "@/t5"}, ("model_type=t5", "expected a model of one of these families")),
    "no configuration": ({"teacher_name": "@/empty"},
    ("--teacher_name=@/empty: the folder holds no loadable config.json",)),
    "model without a network": ({"student_name": "gpt2"}, ("--student_name=gpt2", "without internet",
    "--local-dir FOLDER")),
    "unknown override": ({"student_config_overrides": "layers=3"}, ("layers=3: qwen2 has no such setting",
    "config.json keys")),
    "override of another type": ({"teacher_config_overrides": "hidden_size=wide"}, ("hidden_size=wide: expected int",
    "got str")),
    "heads that do not fit": (
        {"student_init": "random", "student_config_overrides": "num_key_value_heads=3"}, ("num_key_value_heads=3",
        "a multiple"),
    ),
    "batch arithmetic": ({"deepspeed_config": "@/batch.json"}, ("train_batch_size", "7", "4")),
    "groups": ({"layer_groups": "3"}, ("layer_groups", "3")),
    "teacher too narrow": (
        {"direction": "teacher_to_student", "teacher_init": "random", "teacher_config_overrides": "head_dim=6"},
        ("direction=teacher_to_student: a map from the teacher's 6 dimensions", "of its 8",
        "--direction student_to_teacher"),
    ),
    "teacher without directions": (
        {"map_start": "pca", "teacher_init": "random", "teacher_config_overrides": "head_dim=6"},
        ("map_start=pca: the teacher's 6 dimensions", "no 8 principal directions", "--map_start procrustes"),
    ),
    "kernel without a GPU": ({"impl": "triton"}, ("impl=triton: ", "impl=auto")),
    "lost checkpoint": ({"output_dir": "@/lost"}, ("@/lost/checkpoints/latest: names 'step-000009'", "--resume never")),
    "checkpoint without its settings": ({"output_dir": "@/strange"}, ("@/strange/config.yaml: missing",
    "--resume never")),
    "resume elsewhere": ({"resume": "@/data"}, ("resume=@/data", "--output_dir")),
    "no weights": ({"student_name": "@/no_weights"}, ("--student_name=@/no_weights", "model.safetensors",
    "expected the files")),
    "a weight is missing": ({"student_name": "@/one_missing"}, ("1 weights are missing (first: model.norm.weight)",
    "--student_init random")),
    "weights cut off": ({"teacher_name": "@/cut_off"}, ("--teacher_name=@/cut_off", "no loadable model",
    "expected the files")),
}  # fmt: skip
READS_WEIGHTS = {"no weights", "a weight is missing", "weights cut off"}


def flags(folder: Path, case: str) -> list[str]:
    values = {
        "teacher_name": "@/model", "student_name": "@/model", "tokenizer_name": "@/tokenizer", "datasets": "synthetic",
        "synthetic_problems": "20", "max_length": "64", "eval_subset_size": "0", "report_to": "none", "batch_size": "4",
        "max_steps": "1", "deepspeed_config": "ds_configs/zero3_cpu.json", "output_dir": f"@/out {case}",
        **CASES[case][0],
    }  # fmt: skip
    return [token.replace("@", str(folder)) for key, value in values.items() if value for token in (f"--{key}", value)]


def start(*command: str) -> subprocess.CompletedProcess[str]:
    # As a user's shell: no ranks, and kernels that are not interpreted as those of this session are.
    left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TRITON_INTERPRET")
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    # No timeout: killed while DeepSpeed compiles, it would leave a lock behind that every later run waits for.
    return subprocess.run([sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad_input")
    make_models(folder)
    make_files(folder)
    return folder


@pytest.fixture(scope="module")
def outcome(folder) -> Callable[[str], dict]:
    (folder / "run_all.py").write_text(RUN_ALL)
    (folder / "cases.json").write_text(json.dumps({case: flags(folder, case) for case in CASES}))
    done = start(str(folder / "run_all.py"), str(folder / "cases.json"))
    assert "RESULTS" in done.stdout, done.stderr[-4000:]
    return json.loads(done.stdout.split("RESULTS")[1]).__getitem__


@pytest.mark.parametrize("case", CASES)
def test_the_fault_is_told_in_one_line(case, folder, outcome):
    result = outcome(case)
    assert result["code"] == 2, result["stderr"][-3000:]
    assert "Traceback" not in result["stderr"]
    [message] = [line for line in result["stderr"].splitlines() if line.startswith("kvds: ")]
    assert message.startswith("kvds: error: ")
    for part in CASES[case][1]:
        assert part.replace("@", str(folder)) in message, message
    if case not in READS_WEIGHTS:
        assert result["loaded"] == 0


def test_the_program_itself_ends_with_code_2(folder):
    done = start("launch/distill.py", *flags(folder, "malformed row"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("kvds:")] == [
        f"kvds: error: {folder}/malformed.jsonl:2: 'answer' is missing; found ['prompt'] "
        "(mend the row, or --on_bad_row skip)"
    ]
