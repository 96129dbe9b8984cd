"""``kvds completion``: what a shell offers after kvds."""

import subprocess

import pytest

from kvds.cli import COMMANDS, main


def offered(script: str, *words: str) -> list[str]:
    """What bash offers for the last of ``words``."""
    asked = " ".join(f"'{word}'" for word in words)
    done = subprocess.run(
        ["bash", "-c", f"{script}\nCOMP_WORDS=({asked}); COMP_CWORD={len(words) - 1}\n_shtab_kvds\n"
         'printf "%s\\n" "${COMPREPLY[@]}"'],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout.split()


@pytest.fixture(scope="module")
def script() -> str:
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main(["completion", "bash"]) == 0
    return text.getvalue()


def test_bash_offers_commands_flags_choices_and_what_kvds_brings(script):
    assert set(offered(script, "kvds", "")) >= COMMANDS.keys()
    assert offered(script, "kvds", "distill", "--alignment_m") == ["--alignment_mode"]
    assert offered(script, "kvds", "distill", "--alignment_mode", "str") == ["structured", "structural_kv"]
    assert offered(script, "kvds", "distill", "--config", "qwen2_z") == [
        "qwen2_zero3_1gpu", "qwen2_zero3_2x8gpu", "qwen2_zero3_8gpu",
    ]  # fmt: skip
    assert "zero3_cpu" in offered(script, "kvds", "distill", "--deepspeed_config", "zero3")
    assert offered(script, "kvds", "plan", "quick") == ["quickstart", "quickstart_teacher"]


def test_zsh_has_a_script_too(capsys):
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef kvds")
