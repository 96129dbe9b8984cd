"""Flags of a run: either spelling, a help that is short unless all is asked for, hints for typos."""

import argparse
import dataclasses

import pytest

from kvds.config import RunConfig
from kvds.config.flag_parser import as_declared, flag_parser, given_flags
from kvds.config.recipe import parse_run_config
from kvds.errors import InputError


def test_hyphens_and_underscores_are_one():
    same = [
        ["--alignment-mode", "flat", "--student-name=gpt2", "--teacher-name", "gpt2", "--output-dir", "my-out_dir"],
        ["--alignment_mode", "flat", "--student_name=gpt2", "--teacher_name", "gpt2", "--output_dir", "my-out_dir"],
    ]
    first, second = (parse_run_config([*flags, "--no-packing", "--local-rank=1"]) for flags in same)
    assert first == second and (first.output_dir, first.alignment_mode) == ("my-out_dir", "flat")


def test_only_flags_are_spelled_anew():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpu-memory")
    parser.add_argument("--output_dir")
    argv = ["--gpu_memory", "a_b", "--output-dir=c-d", "e-f", "--other-flag", "-gpu_memory", "--", "--output-dir"]
    assert as_declared(argv, parser) == [
        "--gpu-memory", "a_b", "--output_dir=c-d", "e-f", "--other-flag", "-gpu_memory", "--", "--output-dir",
    ]  # fmt: skip


def printed(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as end:
        given_flags(flags)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_is_short_unless_all_is_asked_for(capsys):
    short, whole = printed(capsys, "--help"), printed(capsys, "--help", "all")
    fields = dataclasses.fields(RunConfig)
    common = {field.name for field in fields if field.metadata["common"]}
    told = {field.name for field in fields if f"  --{field.name} " in short}
    assert told == common and {"output_dir", "student_name", "alignment_mode", "dry_run"} <= common
    assert 10 < len(common) < 25 and len(short.splitlines()) < len(whole.splitlines()) / 2
    assert f"--help all lists all {len(fields)} flags." in short and "--help all lists" not in whole
    assert printed(capsys, "-h") == short


def test_a_typo_is_answered_with_the_nearest_flag():
    with pytest.raises(InputError, match=r"unknown flag --alignment-mod, did you mean --alignment_mode\?"):
        given_flags(["--alignment-mod", "flat"])
    with pytest.raises(InputError, match=r"^unexpected argument flat \(expected --flag value; --help all"):
        given_flags(["--seed", "1", "flat"])


def test_the_short_parser_reads_every_flag():
    assert vars(flag_parser(short=True).parse_args(["--kv_parts", "k"])) == {"kv_parts": "k"}
