"""Keys and values of a corpus in safetensors shards: written atomically, checked by hash, read by memory mapping.

A shard holds ``keys``, ``values`` or both, ``[rows, layers, heads, head_dim]``: the selected positions of its samples
one after the other, so that a sample is one contiguous stretch of the file. ``int8`` and ``fp8`` are stored as
``(x − offset) / scale`` with an offset and a scale per channel of each layer and head, since keys carry constants many
times as large as what they vary by. Each shard stands for a fixed run of samples and is written by one process to
the end or not at all: who resumes writes what is missing, and several processes need not talk to each other.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvds.durable_files import json_text, put_in_place
from kvds.errors import InputError
from kvds.kv.states import KV_PARTS

MANIFEST = "manifest.json"
STORES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {"int8": 127.0, "fp8": 448.0}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Replace ``path`` as a whole: processes that write the same, on one node or several, do not disturb each other."""
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.unfinished")
    unfinished.write_text(json_text(content, indent=1) + "\n")
    put_in_place(unfinished, path)


def shard_path(folder: Path, number: int) -> Path:
    """File of shard ``number``; its record lies beside it as ``.json``."""
    return folder / f"shard-{number:05d}.safetensors"


def _encoded(states: Tensor, store: str) -> tuple[Tensor, dict[str, Tensor]]:
    if store not in _LARGEST:
        return states.to(STORES[store]), {}
    wide = states.float()
    low, high = wide.amin(0), wide.amax(0)
    offset, scale = (low + high) / 2, ((high - low) / 2 / _LARGEST[store]).clamp_min(1e-12)
    units = (wide - offset) / scale
    coded = units.round().clamp(-127, 127) if store == "int8" else units
    return coded.to(STORES[store]), {"offset": offset, "scale": scale}


def write_shard(folder: Path, number: int, parts: Mapping[str, Sequence[Tensor]], store: str) -> None:
    """Write the samples of one shard.

    Args:
        folder: Of the cache.
        number: Of the shard.
        parts: ``keys``, ``values`` or both, each per sample ``[positions, layers, heads, head_dim]``.
        store: ``"fp32"``, ``"bf16"``, ``"int8"`` or ``"fp8"``.
    """
    tensors = {}
    for name, samples in parts.items():
        tensors[name], extra = _encoded(torch.cat(list(samples)), store)
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in extra.items()}
    path = shard_path(folder, number)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.unfinished")
    save_file(tensors, unfinished)
    record = {
        "counts": [len(sample) for sample in next(iter(parts.values()))],
        "sha256": _hash(unfinished),
        "bytes": unfinished.stat().st_size,
    }
    put_in_place(unfinished, path)
    write_json(path.with_suffix(".json"), record)


def shard_is_written(folder: Path, number: int) -> bool:
    """Whether shard ``number`` is there as a whole."""
    path = shard_path(folder, number)
    record = path.with_suffix(".json")
    return record.is_file() and path.is_file() and path.stat().st_size == json.loads(record.read_text())["bytes"]


def finish_cache(folder: Path, shards: int, facts: dict[str, Any]) -> bool:
    """Write the manifest if all shards are there; every process may, and writes the same."""
    if not all(shard_is_written(folder, number) for number in range(shards)):
        return False
    records = [json.loads(shard_path(folder, n).with_suffix(".json").read_text()) for n in range(shards)]
    write_json(folder / MANIFEST, {**facts, "shards": records})
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished cache: ``store``, ``fingerprint`` and the record of each shard.

    Raises:
        InputError: it is missing, or not what `kvds cache` writes.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"teacher_cache={folder}: holds no {MANIFEST}; expected what `kvds cache` has finished")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        names = manifest.setdefault("fingerprint", {}).values()
        whole = manifest["store"] in STORES and all(isinstance(text, str) for text in names)
        for record in manifest["shards"]:
            whole = whole and isinstance(record["sha256"], str) and isinstance(record["bytes"], int)
            whole = whole and all(isinstance(count, int) and count >= 0 for count in record["counts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise InputError(f"teacher_cache={path}: damaged; expected what `kvds cache` wrote (run it again)")
    return dict(manifest)


class ShardReader:
    """The samples of a finished cache, read where they lie.

    Args:
        folder: Of the cache.
        dtype: Of what :meth:`sample` returns.
        parts: What is read, of what the shards hold.
        verify: Also compare checksums, which reads the whole cache once.

    Attributes:
        manifest: As :func:`read_manifest` gives it.
        dtype: As given.
        parts: As given.

    Raises:
        InputError: no finished cache there, or a shard that is missing, cut short or changed.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, *, parts: Sequence[str] = KV_PARTS, verify: bool = True
    ) -> None:  # fmt: skip
        self.manifest = read_manifest(folder)
        self.dtype, self.parts, self._store = dtype, tuple(parts), self.manifest["store"]
        self._files: list[Any] = []
        self._scales: list[dict[str, Tensor]] = []
        self._places: list[tuple[int, int, int]] = []
        for number, record in enumerate(self.manifest["shards"]):
            path = shard_path(folder, number)
            if not path.is_file() or path.stat().st_size != record["bytes"]:
                raise InputError(
                    f"teacher_cache={path}: missing or cut short; expected {record['bytes']} bytes (kvds cache)"
                )
            if verify and _hash(path) != record["sha256"]:
                raise InputError(
                    f"teacher_cache={path}: its checksum differs; expected the file as written (kvds cache)"
                )
            try:
                file = safe_open(path, "pt")
            except SafetensorError as error:
                raise InputError(f"teacher_cache={path}: {error}; expected a shard that `kvds cache` wrote") from error
            self._files.append(file)
            self._scales.append({name: file.get_tensor(name) for name in file.keys() if "." in name})  # noqa: SIM118
            begin = 0
            for count in record["counts"]:
                self._places.append((number, begin, begin + count))
                begin += count

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, part: str) -> tuple[int, ...]:
        """Layers, heads and head_dim of a part."""
        return tuple(self._files[0].get_slice(part).get_shape()[1:])

    def count(self, number: int) -> int:
        """Stored positions of a sample."""
        _, begin, end = self._places[number]
        return end - begin

    def sample(self, number: int) -> dict[str, Tensor]:
        """The parts of a sample, ``[positions, layers, heads, head_dim]`` each."""
        shard, begin, end = self._places[number]
        return {name: self._read(shard, name, begin, end) for name in self.parts}

    def _read(self, shard: int, name: str, begin: int, end: int) -> Tensor:
        stored = self._files[shard].get_slice(name)[begin:end]
        if self._store not in _LARGEST:
            return stored.to(self.dtype)
        scales = self._scales[shard]
        return (stored.float() * scales[f"{name}.scale"] + scales[f"{name}.offset"]).to(self.dtype)
