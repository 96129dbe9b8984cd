"""Command line ``kvds COMMAND …``: training, and all that is done before and after it."""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import select
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

from kvds.durable_files import full_disk
from kvds.errors import InputError, RunError

# Command → what it does. Its module under kvds.commands is imported only when it is asked for.
COMMANDS = {
    "ab": ("ab", "an experiment: arms × seeds of a plan, paired statistics, report"),
    "cache": ("cache", "write a teacher's keys and values of a corpus to disk, to train without the teacher"),
    "completion": ("completion", "a shell's script for tab completion"),
    "data": ("data", "show rows as the model will read them: format, segments, lengths, what is left out"),
    "distill": ("distill", "train a student: alone, or each rank that deepspeed, torchrun, accelerate or srun starts"),
    "doctor": ("doctor", "look over this machine: versions, devices, compiler, space, network, kernel, sqlite"),
    "eval": ("evaluate", "cross entropy and exact match of a model on held-out rows"),
    "export": ("export", "turn a checkpoint of a run into a plain student and its map_aligner.pt"),
    "handoff": (
        "handoff",
        "fit|eval|export the map by which a student writes on from its teacher's keys and values",
    ),
    "plan": ("plan", "memory, time and disk of a recipe before it is queued, and what to change where it does not fit"),
    "prefetch": ("prefetch", "models, tokenizers and data sets of a recipe into a folder, for nodes without internet"),
    "profile": ("profile", "what an aligner is made of and what it has learned"),
    "prune": ("prune", "a smaller student of some of a model's own layers, chosen by hand or by what each is worth"),
    "quickstart": ("quickstart", "three students of a shipped teacher in a few minutes, compared"),
    "report": ("report", "table and loss curves of one or more runs"),
    "track": ("track", "hand the records of a run to MLflow, where it lacks them"),
}
# Command → packages of an extra without which it can do nothing.
NEEDS = {
    "ab": ("scipy", "matplotlib"), "completion": ("shtab",), "profile": ("matplotlib",), "track": ("mlflow",),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help lists all flags)")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    head, foot = "usage: kvds COMMAND [--flag value …]", "kvds COMMAND --help lists a command's flags."
    return "\n".join([head, "", *lines, "", foot])


def _run(module_name: str, name: str, flags: Sequence[str]) -> int:
    """Import, parse and run one command."""
    from kvds.config.extras import need
    from kvds.config.flag_parser import as_declared, declared_flags, unknown_flag

    need(f"kvds {name}", *NEEDS.get(name, ()))
    module = importlib.import_module(f"kvds.commands.{module_name}")
    parser = _Parser(prog=f"kvds {name}", description=module.__doc__, allow_abbrev=False)
    module.add_arguments(parser)
    arguments, unknown = parser.parse_known_args(as_declared(flags, parser))
    if unknown:
        raise unknown_flag(unknown, sorted(declared_flags(parser)), f"kvds {name} --help lists all flags")
    return module.run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 where it could not be done, 2 where the input is at fault, 141
    where nobody reads what it prints any more (``kvds … | head``).
    """
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # here, where it can be told what became of it, and not at the interpreter's end
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _reader_is_gone(stream)]
        if not unread:  # another pipe: no business of the shell's
            raise
        for stream in unread:  # what is left in its buffer goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 128 + signal.SIGPIPE


def _reader_is_gone(stream: TextIO) -> bool:
    poll = select.poll()
    try:
        poll.register(stream, 0)
    except OSError:  # text that is kept in memory
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _main(flags: list[str]) -> int:
    if flags and flags[0].startswith(("--local_rank=", "--local-rank=")):  # from `deepspeed --module kvds COMMAND …`
        flags = flags[1:]
    if not flags or flags[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if flags else 2
    if flags[0] == "--version":
        from kvds import __version__

        print(f"kvds {__version__}")
        return 0
    if flags[0] == "distill":  # whose flags are the settings, and which sets up its own log
        return importlib.import_module("kvds.commands.distill").run_flags(flags[1:])
    logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
    logging.getLogger("kvds").setLevel(logging.INFO)
    try:
        name = flags[0]
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
            raise InputError(f"unknown command {' '.join(name.split())[:100]}; {hint} (kvds --help)")
        from tqdm.contrib.logging import logging_redirect_tqdm  # log lines above progress bars, not in them

        with logging_redirect_tqdm():
            return _run(COMMANDS[name][0], name, flags[1:])
    except (InputError, RunError) as error:
        print(f"kvds: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not (fault := full_disk(error)):
            raise
        print(f"kvds: error: {fault} (make room, then start again)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
