"""Rows as tokens on disk: tokenised once, read by memory mapping by every rank and every later run.

A file is named by a hash of all that its contents follow from: the rows' texts, the tokenizer, the options. It is
written aside and renamed, so that it is whole or not there, whoever else writes the same at the same time; it holds its
name and a checksum of its rows, so that one that was damaged or swapped for another is written anew. Fast
tokenizers use all cores for one call (unless ``TOKENIZERS_PARALLELISM=false``), which is why one process encodes and
the others wait, instead of ``datasets``' map over processes: that would send rows and tokenizer through pickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, overload

import tokenizers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvds.data.encoding import EncodedCorpus, EncodedSample, compare_rows, encode_examples
from kvds.data.example import Example
from kvds.data.text_fidelity import TextFidelity
from kvds.durable_files import json_text, put_in_place
from kvds.identity.contents import short_hash, tokenizer_identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("kvds")

# Part of each fingerprint: raise it whenever rows are encoded or stored in another way.
_FORMAT = 4
_TEACHER, _FACTS = "teacher.", "kvds"


@dataclass(frozen=True)
class TokenFiles:
    """Where rows as tokens are kept, and this process's turn.

    Attributes:
        folder: Of the files; None = nothing is kept.
        first: Whether this process looks and writes before ``wait``; the others look after it.
        wait: Returns when all processes have called it.
    """

    folder: Path | None = None
    first: bool = True
    wait: Callable[[], object] = lambda: None


def encode_once(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    reasoning_steps: bool = False,
    files: TokenFiles,
) -> EncodedCorpus:
    """Rows as tokens, compared with their text; from a file where one holds these very rows, else into one.

    A folder that cannot be written or read costs a warning and the time to tokenise. Rows of a tokenizer without a
    ``tokenizer.json``, which cannot be told from another by its contents, are not kept.
    """
    if files.folder is None or not tokenizer.is_fast:
        return _encoded(examples, tokenizer, max_length, reasoning_steps)
    path = files.folder / f"{_fingerprint(examples, tokenizer, max_length, reasoning_steps)}.safetensors"
    corpus = None
    try:
        if files.first:
            corpus = read_corpus(path, verify=True)
            if corpus is None:
                corpus = _encoded(examples, tokenizer, max_length, reasoning_steps)
                _write_corpus(path, corpus)
    finally:  # whatever became of it, the others go on
        files.wait()
    if corpus is None:
        corpus = read_corpus(path)
    return _encoded(examples, tokenizer, max_length, reasoning_steps) if corpus is None else corpus


def _encoded(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, reasoning_steps: bool
) -> EncodedCorpus:
    corpus = encode_examples(examples, tokenizer, max_length, reasoning_steps=reasoning_steps)
    return replace(corpus, fidelity=compare_rows(corpus.samples, examples, tokenizer))


def _fingerprint(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, reasoning_steps: bool
) -> str:
    options = (
        _FORMAT, tokenizers.__version__, transformers.__version__, tokenizer_identity(tokenizer), max_length,
        reasoning_steps,
    )  # fmt: skip
    digest = hashlib.sha256(json_text(options).encode())
    for example in examples:
        chat = example.rendered and (example.rendered.text, example.rendered.spans)
        texts = (example.prompt, example.rationale, example.answer, example.teacher_rationale)
        digest.update(json_text((*texts, example.form, example.ends, chat)).encode())
    return digest.hexdigest()[:32]


class StoredSamples(Sequence[EncodedSample]):
    """The rows of a file, each made when it is asked for.

    Args:
        columns: Name → tensor, as :func:`_columns` makes them.
    """

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self._columns = columns
        self._digest: str | None = None
        self._ends: list[int] = columns["ends"].tolist()
        self._teachers: dict[int, EncodedSample] = {}
        if f"{_TEACHER}ends" in columns:
            own = {key.removeprefix(_TEACHER): value for key, value in columns.items() if key.startswith(_TEACHER)}
            self._teachers = {row.example: row for row in StoredSamples(own)}

    @property
    def digest(self) -> str:
        """Of all columns; read once."""
        if self._digest is None:
            self._digest = _digest(self._columns)
        return self._digest

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, position: int) -> EncodedSample: ...

    @overload
    def __getitem__(self, position: slice) -> list[EncodedSample]: ...

    def __getitem__(self, position: int | slice) -> EncodedSample | list[EncodedSample]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        position = range(len(self))[position]
        part = slice(self._ends[position - 1] if position else 0, self._ends[position])
        example = int(self._columns["example"][position])
        steps = self._columns.get("step_ids")
        return EncodedSample(
            tuple(self._columns["input_ids"][part].tolist()),
            tuple(self._columns["segment_ids"][part].tolist()),
            example,
            () if steps is None else tuple(steps[part].tolist()),
            self._teachers.get(example),
        )


def _columns(samples: Sequence[EncodedSample], prefix: str = "") -> dict[str, Tensor]:
    """Rows one after the other in flat columns; what their teacher reads in columns of its own."""

    def flat(rows: Iterable[Sequence[int]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(chain.from_iterable(rows)), dtype=dtype)

    columns = {
        "ends": torch.tensor(list(accumulate(len(row.input_ids) for row in samples)), dtype=torch.int64),
        "example": torch.tensor([row.example for row in samples], dtype=torch.int64),
        "input_ids": flat((row.input_ids for row in samples), torch.int32),
        "segment_ids": flat((row.segment_ids for row in samples), torch.uint8),
    }
    if any(row.reasoning_step_ids for row in samples):
        columns["step_ids"] = flat((row.reasoning_step_ids for row in samples), torch.int32)
    columns = {f"{prefix}{name}": column for name, column in columns.items()}
    teachers = [row.teacher_text for row in samples if row.teacher_text is not None]
    return columns | (_columns(teachers, _TEACHER) if teachers else {})


def rows_identity(samples: Sequence[EncodedSample]) -> str:
    """Every token of every row, in order, whether they lie in a file or not."""
    digest = samples.digest if isinstance(samples, StoredSamples) else _digest(_columns(samples))
    return f"{len(samples)} rows {digest[:16]}"


def _digest(columns: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, column in sorted(columns.items()):
        digest.update(f"{name} {column.dtype} {list(column.shape)}\n".encode())
        digest.update(column.numpy().data)
    return digest.hexdigest()


def _write_corpus(path: Path, corpus: EncodedCorpus) -> None:
    unfinished = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.unfinished")  # no other process's
        columns = _columns(corpus.samples)
        facts = {
            "too_long": corpus.too_long, "fidelity": corpus.fidelity.to_json(), "rows": _digest(columns),
            "of": path.stem,
        }  # fmt: skip
        # In one entry: several are written in any order, and the same rows would be other bytes each time.
        text = json_text(facts | {"facts": short_hash(facts)})
        save_file(columns, unfinished, {_FACTS: text})
        put_in_place(unfinished, path)
    except (OSError, SafetensorError) as error:
        log.warning("data_cache=%s: rows as tokens could not be kept there (%s)", path.parent, error)
        if unfinished is not None:
            with contextlib.suppress(OSError):
                unfinished.unlink()


def read_corpus(path: Path, *, verify: bool = False) -> EncodedCorpus | None:
    """The rows of a file, memory-mapped; None where there is none that can be read.

    Args:
        path: Of the file.
        verify: Also read all of it, and refuse what is not what was written under this name.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            facts = json.loads(file.metadata()[_FACTS])
        samples = StoredSamples(columns)
        if verify and facts["of"] != path.stem:
            raise ValueError(f"holds the rows of {facts['of']}")
        if verify and (facts["rows"] != samples.digest or facts.pop("facts") != short_hash(facts)):
            raise ValueError("its checksum differs")
        return EncodedCorpus(samples, int(facts["too_long"]), TextFidelity.from_json(facts["fidelity"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
        log.warning("data_cache=%s: cannot be read (%s); rows are tokenised anew", path, error)
        return None
