"""Files that a user downloads can hold code, pickles and paths: none is run or followed, each is told in one line."""

import json
import os
import pickle
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config

from kvds.checkpoint.aligner_file import load_aligner
from kvds.checkpoint.folder import commit_checkpoint
from kvds.checkpoint.manifest import ChecksummedFile
from kvds.cli import main
from kvds.config import RunConfig
from kvds.config.recipe import parse_run_config
from kvds.data.encoding import encode_examples, prompt_ids
from kvds.data.example import Example
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.errors import InputError
from kvds.models.architecture import load_config
from kvds.models.loading import load_model
from kvds.models.tokenizer import load_tokenizer
from kvds.tracking.tracker import ui_command

REPOSITORY = Path(__file__).resolve().parents[2]


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path) -> Path:
    """What must not be there at the end."""
    mark = tmp_path / "code was run"
    yield mark
    assert not mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_as_aligner_is_refused(zipped, tmp_path, mark):
    file = tmp_path / "map_aligner.pt"
    torch.save({"config": {}, "state_dict": Payload(mark)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="map_aligner.pt: not an aligner that kvds saved"):
        load_aligner(file)
    file.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(InputError, match="map_aligner.pt: not an aligner that kvds saved"):
        load_aligner(file)


def test_a_pickle_put_into_a_checkpoint_is_not_read(tmp_path, mark, capsys):
    run = tmp_path / "run"
    aside = run / "checkpoints/step-000003.unfinished"
    aside.mkdir(parents=True)
    entries = {}
    for name in ("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        with (aside / name).open("wb") as plain:
            file = ChecksummedFile(plain)
            torch.save({"weights": torch.zeros(3)}, file)
            entries[name] = file.finish()
    commit_checkpoint(run, 3, entries, keep=0)
    Qwen2Config().save_pretrained(run / "checkpoints/model")
    for victim in ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"):
        torch.save(Payload(mark), run / "checkpoints/step-000003" / victim)
        assert main(["export", "--run", str(run), "--output", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert "step-000003: not whole, zero_pp_rank_" in message and "Traceback" not in message
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_pickle_beside_the_checkpoints_is_not_read(tmp_path, mark, capsys):
    """The aligner's shapes lie outside of every manifest: they are read as data, before DeepSpeed reads anything."""
    run = tmp_path / "run"
    aside = run / "checkpoints/step-000003.unfinished"
    aside.mkdir(parents=True)
    with (aside / "states.pt").open("wb") as plain:
        file = ChecksummedFile(plain)
        file.write(b"never read")
        commit_checkpoint(run, 3, {"states.pt": file.finish()}, keep=0)
    Qwen2Config().save_pretrained(run / "checkpoints/model")
    torch.save(Payload(mark), run / "checkpoints/model/aligner.pt")
    assert main(["export", "--run", str(run), "--output", str(tmp_path / "out")]) == 2
    assert "model/aligner.pt: not what kvds saved" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_latest_cannot_lead_an_export_out_of_its_folder(tmp_path, mark, capsys):
    (tmp_path / "x").mkdir()
    torch.save(Payload(mark), tmp_path / "x/mp_rank_00_model_states.pt")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/latest").write_text("../../x")
    assert main(["export", "--run", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 2
    assert "latest: names '../../x'; expected a folder step-NNNNNN beside it" in capsys.readouterr().err


CODE = """
import os
os.mkdir({mark!r})
from transformers import PretrainedConfig, PreTrainedTokenizerFast as Evil
class EvilConfig(PretrainedConfig):
    model_type = "evil"
"""


def folder_with_code(folder: Path, mark: Path) -> Path:
    folder.mkdir()
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def test_code_in_a_model_folder_is_not_run(tmp_path, mark):
    folder = folder_with_code(tmp_path / "evil", mark)
    with pytest.raises(InputError, match="--teacher_name=.*evil: the folder holds no loadable config.json"):
        load_config(str(folder), flag="teacher")


def test_code_in_a_tokenizer_folder_is_not_run(tmp_path, mark):
    folder = folder_with_code(tmp_path / "evil", mark)
    cfg = RunConfig(model_name="gpt2", tokenizer_name=str(folder), output_dir=str(tmp_path / "out"))
    with pytest.raises(InputError, match="--tokenizer_name=.*evil"):
        load_tokenizer(cfg)
    # The same with a whole tokenizer beside the code: it is read as data, or refused.
    train_problem_tokenizer(tmp_path / "good")
    for file in (tmp_path / "good").iterdir():
        content = json.loads(file.read_text()) if file.name == "tokenizer_config.json" else None
        if content is None:
            shutil.copy(file, folder)
        else:
            content["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
            (folder / file.name).write_text(json.dumps(content))
    try:
        tokenizer = load_tokenizer(cfg)
    except InputError:
        return
    assert type(tokenizer).__module__.startswith("transformers.")


def test_a_pickle_as_weights_is_not_run(tmp_path, mark):
    config = Qwen2Config(
        vocab_size=16, num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "model")
    torch.save({"model.norm.weight": Payload(mark)}, tmp_path / "model/pytorch_model.bin")
    with pytest.raises(InputError, match="--student_name=.*model"):
        load_model(
            str(tmp_path / "model"), config, init="pretrained", dtype=torch.float32, attn_implementation="eager",
            seed=0, flag="student",
        )  # fmt: skip


def test_evaluation_runs_neither_code_nor_pickles(tmp_path, mark, capsys):
    code = folder_with_code(tmp_path / "evil", mark)
    train_problem_tokenizer(tmp_path / "tokenizer")
    Qwen2Config(vocab_size=16, num_hidden_layers=1).save_pretrained(tmp_path / "pickled")
    torch.save({"model.norm.weight": Payload(mark)}, tmp_path / "pickled/pytorch_model.bin")
    for model, tokenizer in (
        (code, code),
        (code, tmp_path / "tokenizer"),
        (tmp_path / "pickled", tmp_path / "tokenizer"),
    ):
        assert main(["eval", "--model", str(model), "--tokenizer", str(tokenizer)]) == 2
        assert "holds no loadable" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [False, True])
def test_an_end_of_text_token_that_a_row_spells_out_ends_nothing(steps, tmp_path):
    train_problem_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    end = tokenizer.eos_token
    examples = [Example(f"Lee {end} has?", f"1 {end} 2", f"3 {end}", "own", "rows.jsonl:1")]
    [sample] = encode_examples(examples, tokenizer, 512, reasoning_steps=steps).samples
    assert sample.input_ids.index(tokenizer.eos_token_id) == len(sample.input_ids) - 1
    assert tokenizer.eos_token_id not in prompt_ids(examples, tokenizer)[0]


HOSTILE = ["$(mkdir MARK)", "`mkdir MARK`", "x; mkdir MARK", "x|mkdir MARK", "x && mkdir MARK #", "x' ; mkdir MARK ; '"]


@pytest.mark.parametrize("script", ["one_gpu.sh", "one_node.sh", "torchrun.sh"])
def test_launch_files_hand_names_on_as_they_are(script, tmp_path, mark):
    """Launchers that only say what they were started with; ``test_launch_files.py`` looks at the rest."""
    for launcher in ("deepspeed", "torchrun"):
        (tmp_path / launcher).write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
        (tmp_path / launcher).chmod(0o755)
    names = [name.replace("MARK", shlex.quote(str(mark))) for name in HOSTILE]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(REPOSITORY / "launch" / script), "r.yaml", "--teacher_names", *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[-len(names) - 1 : -1] == names


@pytest.mark.parametrize("name", HOSTILE)
def test_shell_characters_in_names_are_letters(name, tmp_path, mark, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = name.replace("MARK", shlex.quote(str(mark)))
    for flag in ("--teacher_name", "--tokenizer_name", "--datasets"):
        try:
            cfg = parse_run_config(["--model_name", "gpt2", "--output_dir", "out", flag, hostile])
            if flag == "--teacher_name":
                load_config(cfg.first_teacher or "", flag="teacher")
            elif flag == "--tokenizer_name":
                load_tokenizer(cfg)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert flag == "--datasets"  # names of corpora are looked up when they are read
    command = shlex.split(ui_command(tmp_path / hostile))
    assert command[:3] == ["mlflow", "ui", "--backend-store-uri"] and command[-2:] == ["--host", "127.0.0.1"]
    assert command[3].endswith("/mlflow.db") and len(command) == 6
