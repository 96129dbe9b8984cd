"""Rows of one's own, whatever holds them: JSON lines and lists, CSV, parquet, folders, data sets of the hub.

``OWNER/NAME[/CONFIG][@TRAIN[,EVAL]]`` is a data set of the hub, through ``datasets``; a folder is what ``save_to_disk``
wrote or data files side by side. Of a data set with splits, ``train`` is trained on, and judged by the first of
``validation``, ``valid``, ``val``, ``dev``, ``eval`` and ``test`` that there is.

JSON and tables are read here and not by ``datasets``, which takes a table's ``007`` for 7.0, its ``NA`` for nothing and
a text that looks like a time for one, and names no file where a row is malformed.

Streamed rows are read one after the other, never stored, and taken from a shuffled buffer, so that a data set may be
larger than disk and memory: as many stay as ``--subset_size`` asks for.
"""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvds.config.settings import DataSettings
from kvds.config.values import split_dataset_weight
from kvds.data.corpora import Corpus
from kvds.data.corpus_names import held_out_file, is_file, is_folder, is_own, is_own_file, own_file, split_names
from kvds.data.row_formats import RowReader, recognise
from kvds.data.rows import BadRow, file_rows
from kvds.errors import InputError, listed, one_line

_HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test")
# Rows that are looked at for one whose format is known, and rows among which streamed ones are shuffled.
_LOOKED_AT, _BUFFER = 100, 10_000
_DELIMITERS = {".csv": ",", ".tsv": "\t"}

Numbered = Iterator[tuple[int, Any]]


@dataclass(frozen=True)
class Reading:
    """How one's own data are read.

    Attributes:
        form: ``--data_format``.
        columns: ``--columns``: none, one for all, or one for each of the data sets.
        streaming: Whether rows are read one after the other, and only as many as are taken.
        held_out_rows: Of those, how many to judge by.
    """

    form: str = "auto"
    columns: tuple[str, ...] = ()
    streaming: bool = False
    held_out_rows: int | None = None

    @classmethod
    def of(cls, cfg: DataSettings) -> Reading:
        """As the settings of a run say."""
        return cls(cfg.data_format, cfg.columns, cfg.streaming, cfg.eval_subset_size)

    def columns_of(self, datasets: Sequence[str]) -> dict[str, str]:
        """Name of a data set, without weight → its columns.

        Raises:
            InputError: columns are named and no data set of one's own is there to have them.
        """
        names = [split_dataset_weight(spec)[0] for spec in datasets]
        if set(self.columns) - {"auto"} and not any(map(is_own, names)):
            raise InputError(
                f"columns={' '.join(self.columns)}: {listed(names, 'and')} have columns of their own; expected data of "
                "your own among --datasets (or leave --columns away)"
            )
        each = self.columns if len(self.columns) > 1 else (self.columns or ("auto",)) * len(names)
        return dict(zip(names, each, strict=False))


AS_THEY_ARE = Reading()


@dataclass(frozen=True)
class OwnRows:
    """Rows of one split, or of both where the data has none.

    Attributes:
        label: Where they stand, for messages.
        rows: Number and parsed row of each.
        separate: Whether they are of one split alone.
        beside: Where held-out rows would be looked for.
        form: ``--data_format``.
        columns: Of this data set.
    """

    label: str
    rows: Numbered
    separate: bool
    beside: str
    form: str
    columns: str

    def recognised(self, on_bad_row: str) -> tuple[RowReader, Numbered]:
        """The reader of these rows, and all of them.

        Raises:
            InputError: no row is of a known format; the first is named.
        """
        looked_at: list[tuple[int, Any]] = []
        fault: InputError | None = None
        rows = self._whole()
        for number, row in itertools.islice(rows, _LOOKED_AT):
            looked_at.append((number, row))
            if not isinstance(row, dict):
                if on_bad_row == "error":  # who reads it says what is wrong
                    break
                continue
            try:
                reader = recognise(row, f"{self.label}:{number}", form=self.form, columns=self.columns)
                return reader, itertools.chain(looked_at, rows)
            except InputError as error:
                fault = fault or error
        if fault is not None:
            raise fault
        return RowReader("reasoning", {"prompt": "prompt", "answer": "answer"}, ""), itertools.chain(looked_at, rows)

    def _whole(self) -> Numbered:
        """The rows; what a library says of a file that it cannot read is an input error."""
        try:
            yield from self.rows
        except InputError:
            raise
        except Exception as error:  # readers of files and the hub's client raise dozens of kinds
            raise InputError(
                f"{self.label}: cannot be read ({one_line(error)[:160]}); expected the file or data set that its name "
                "says"
            ) from error


def own_rows(
    name: str, split: str, *, data_dir: str | None, columns: str, reading: Reading, seed: int
) -> OwnRows:  # fmt: skip
    """The rows of a data set of one's own.

    Args:
        name: As given, without weight.
        split: ``"train"`` or ``"eval"``.
        data_dir: Where files may lie.
        columns: Of this data set.
        reading: How it is read.
        seed: Of the order of a stream.

    Raises:
        InputError: it cannot be opened.
    """
    shuffled = seed if split == "train" else None
    mark = " (streamed)" if reading.streaming else ""  # numbered as they come, not as they lie there
    if not is_own_file(name):
        loaded, label, beside = _hub(name, reading.streaming), name, f"a split (--datasets {name}@TRAIN,EVAL)"
    else:
        path = own_file(split_names(name)[0], data_dir)
        if is_folder(path) and path.suffix not in (".json", ".jsonl"):
            loaded, label, beside = _folder(path, name), str(path), "a split"
        else:
            beside_file = held_out_file(path)
            separate = is_file(beside_file)
            source = beside_file if separate and split == "eval" else path
            rows = _drawn(partial(_file, source), shuffled) if reading.streaming else _file(source)
            return OwnRows(str(source), rows, separate, beside_file.name, reading.form, columns)
    chosen, separate = _split(loaded, split, name)
    rows = _stream(chosen, shuffled) if reading.streaming else _numbered(chosen)
    return OwnRows(f"{label}{mark}", rows, separate, beside, reading.form, columns)


def _file(path: Path) -> Numbered:
    if path.suffix in (".json", ".jsonl"):
        return file_rows(path)
    if not is_file(path):
        raise InputError(f"{path}: No such file or directory; expected a data file there (see --data_dir)")
    return _table(path, _DELIMITERS[path.suffix]) if path.suffix in _DELIMITERS else _numbered(_columnar(path))


def _table(path: Path, delimiter: str) -> Numbered:
    """Lines and rows of a CSV file with a line of names; every value is the text that stands there."""
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            names = next(reader, [])
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise InputError(f"{path}:1: the column {one_line(twice)} stands there twice; expected each once")
            begin = reader.line_num + 1
            for values in reader:
                if values and len(values) != len(names):
                    yield begin, BadRow(f"has {len(values)} fields; expected {len(names)}, as the first line has")
                elif values:
                    yield begin, dict(zip(names, values, strict=True))
                begin = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}); expected a table in UTF-8") from error
    except csv.Error as error:
        raise InputError(f"{path}:{begin}: {error}; expected a table with quotes that are closed") from error


def _drawn(rows: Callable[[], Numbered], seed: int | None) -> Numbered:
    """Rows of a file, by ``seed`` drawn from a buffer of it."""
    if seed is None:
        return rows()
    from datasets import IterableDataset

    stream = IterableDataset.from_generator(lambda: ({"row": row} for row in rows()))
    return (example["row"] for example in stream.shuffle(seed=seed, buffer_size=_BUFFER))


def _columnar(path: Path) -> Any:
    """Rows of a parquet or arrow file, a few at a time."""
    from datasets import load_dataset

    kind = path.suffix.removeprefix(".")
    try:  # a stream, so that no copy is made elsewhere on the disk
        return load_dataset(kind, data_files=str(path), split="train", streaming=True)
    except Exception as error:  # each reader of files has exceptions of its own
        raise InputError(f"{path}: cannot be read ({one_line(error)[:160]}); expected a {kind} file") from error


def _folder(path: Path, name: str) -> Any:
    from datasets import load_dataset, load_from_disk

    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return load_from_disk(str(path))
        return load_dataset(str(path), streaming=True)
    except Exception as error:  # as above
        raise InputError(
            f"datasets={name}: {path} cannot be read as data ({one_line(error)[:160]}); expected a folder written by "
            "save_to_disk, or of data files (parquet, JSON lines, CSV)"
        ) from error


def _hub(name: str, streaming: bool) -> Any:
    from datasets import load_dataset

    whole, splits = split_names(name)
    parts = whole.split("/", 2)
    repository, config = "/".join(parts[:2]), parts[2] if len(parts) > 2 else None
    try:
        if splits:
            return {split: load_dataset(repository, config, split=split, streaming=streaming) for split in splits}
        return load_dataset(repository, config, streaming=streaming)
    except Exception as error:  # the hub's client raises a dozen kinds, most of them for a missing network
        raise InputError(
            f"datasets={name}: {repository} could not be loaded from the hub or its cache ({one_line(error)[:160]}); "
            "expected OWNER/NAME, OWNER/NAME/CONFIG or OWNER/NAME@TRAIN,EVAL of a data set there, or what "
            "`kvds prefetch RECIPE --to DIR` brings where there is internet"
        ) from error


def _split(loaded: Any, split: str, name: str) -> tuple[Any, bool]:
    """The rows of one split, or all and that they are of both."""
    if not isinstance(loaded, Mapping):
        return loaded, False
    _, said = split_names(name)
    there = list(loaded)
    train = said[0] if said else "train" if "train" in there else there[0] if len(there) == 1 else None
    held_out = said[1] if len(said) > 1 else None if said else next((one for one in _HELD_OUT if one in there), None)
    for one in (train, held_out):
        if train is None or (one is not None and one not in there):
            raise InputError(
                f"datasets={name}: has no split {one or 'train'}, but {listed(sorted(map(str, there)), 'and')}; "
                f"expected to be told which (--datasets {split_names(name)[0]}@{there[0]})"
            )
    if held_out is None or held_out == train:
        return loaded[train], False
    return loaded[held_out if split == "eval" else train], True


def _numbered(rows: Iterable[Any]) -> Numbered:
    return ((number, dict(row)) for number, row in enumerate(rows, 1))


def _stream(rows: Any, seed: int | None) -> Numbered:
    """Rows of a stream, by ``seed`` drawn from a buffer of it."""
    if not hasattr(rows, "to_iterable_dataset") and seed is None:
        return _numbered(rows)
    stream = rows.to_iterable_dataset() if hasattr(rows, "to_iterable_dataset") else rows
    return _numbered(stream if seed is None else stream.shuffle(seed=seed, buffer_size=_BUFFER))


def corpus_rows(name: str, corpus: Corpus, split: str) -> Numbered:
    """Rows of a known corpus from the hub.

    Raises:
        InputError: it cannot be loaded.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(corpus.hub_name, corpus.hub_config, split=corpus.hub_splits[split])
    except Exception as error:  # as in _hub
        raise InputError(
            f"datasets={name}: {corpus.hub_name} could not be loaded from the hub or its cache "
            f"({one_line(error)[:160]}); without internet, expected --data_dir FOLDER with {corpus.files[split]}, "
            "or what `kvds prefetch RECIPE --to DIR` brings where there is some"
        ) from error
    yield from _numbered(rows)
