"""The files of a cache map: ``handoff.safetensors`` and ``handoff.json``, which lie beside the student.

The first holds ``key_weight``, ``key_bias``, ``value_weight`` and ``value_bias`` as the attributes of
:class:`kvds.handoff.cache_map.CacheMap`; the second the shapes, the source layers, what teacher, student and tokenizer
it was fitted to, and how well it fits. docs/handoff_connector.md has them in full.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kvds.durable_files import UNFINISHED, json_text, put_in_place, write_durably
from kvds.errors import InputError, one_line
from kvds.handoff.cache_map import CacheMap
from kvds.handoff.model import HandoffModel
from kvds.identity.contents import architecture_identity, differences, tokenizer_identity
from kvds.kv import KVShape
from kvds.models.architecture import load_config
from kvds.models.loading import load_model
from kvds.models.tokenizer import check_vocabulary, tokenizer_of
from kvds.models.weight_files import HANDOFF_FILE
from kvds.models.weights_identity import weights_identity

CONFIG_FILE = "handoff.json"
FORMAT = 1
_SHAPE = ("num_hidden_layers", "num_key_value_heads", "head_dim", "num_attention_heads")


def save_map(cache_map: CacheMap, folder: Path, facts: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write both files into ``folder``, which may hold the student.

    Args:
        cache_map: Fitted.
        folder: Made if missing.
        facts: What else ``handoff.json`` says: ``identity`` (from :func:`pair_identity`), ``fit``.
        dtype: Of the weights on disk.

    Raises:
        InputError: a weight is not finite in that dtype.
    """
    state = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in cache_map.state_dict().items()}
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"handoff: {name} is not finite in {dtype}; expected a wider type (--dtype fp32)")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / (HANDOFF_FILE + UNFINISHED)
    save_file(state, unfinished, {"format": "pt"})
    put_in_place(unfinished, folder / HANDOFF_FILE)
    content = {
        "format": FORMAT,
        "keys": "before the rotary embedding; the student's own is applied at positions that count real tokens from 0",
        "dtype": str(dtype).removeprefix("torch."),
        **{side: {name: getattr(getattr(cache_map, side), name) for name in _SHAPE} for side in ("teacher", "student")},
        "sources": [list(layers) for layers in cache_map.sources],
        **facts,
    }
    write_durably(folder / CONFIG_FILE, json_text(content, indent=1) + "\n")


def load_map(folder: Path) -> tuple[CacheMap, dict[str, Any]]:
    """The map in ``folder`` and what ``handoff.json`` says.

    Raises:
        InputError: none is there, or not one that kvds wrote.
    """
    for name in (HANDOFF_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: has no {name}; expected what `kvds handoff fit` writes there (or --map DIR)")
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        shapes = {
            side: KVShape(**{name: int(content[side][name]) for name in _SHAPE}) for side in ("teacher", "student")
        }
        found = CacheMap(shapes["teacher"], shapes["student"], content["sources"])
        state: dict[str, Tensor] = load_file(folder / HANDOFF_FILE)
        found.load_state_dict(state)
        found.to(next(iter(state.values())).dtype)
    except Exception as error:  # a damaged file can fail anywhere
        raise InputError(
            f"{folder}: its handoff files cannot be read ({one_line(error)}); expected what `kvds handoff fit` writes"
        ) from error
    return found, content


def pair_identity(teacher: str, student: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What a map is fitted to: architecture and every byte of the weights of both models, and the tokenizer.

    Args:
        teacher: Folder or hub name.
        student: Folder or hub name.
        tokenizer: Of both.
    """
    found = {"tokenizer": tokenizer_identity(tokenizer)}
    for side, name in (("teacher", teacher), ("student", student)):
        option = f"--{side}"
        found[side] = architecture_identity(load_config(name, flag=side, option=option))
        found[f"{side} weights"] = weights_identity(name, init="pretrained", seed=0, flag=option)
    return found


def one_tokenizer(teacher: str, student: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a pair, the student's.

    Raises:
        InputError: the teacher brings another vocabulary.
    """
    own, theirs = tokenizer_of(student, "--student"), tokenizer_of(teacher, "--teacher")
    if own.get_vocab() != theirs.get_vocab():
        raise InputError(
            f"--teacher={teacher}: its tokenizer ({len(theirs)} entries) differs from the student's ({len(own)} "
            "entries); expected two models of one vocabulary: token t of the teacher's cache becomes token t of the "
            "student's, and another tokenizer cuts the text elsewhere"
        )
    return own


def load_pair(
    teacher: str, student: str, tokenizer: PreTrainedTokenizerBase, *, dtype: Any = "auto"
) -> tuple[nn.Module, nn.Module]:
    """Teacher and student, whole, in evaluation mode, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = []
    for side, name in (("teacher", teacher), ("student", student)):
        option = f"--{side}"
        config = load_config(name, flag=side, option=option)
        KVShape.from_config(config)
        model = load_model(
            name, config, init="pretrained", dtype=dtype, attn_implementation=None, seed=0, flag="model", option=option
        )
        check_vocabulary(config, tokenizer, flag="model", option=option)
        models.append(model.to(device).eval())
    return models[0], models[1]


def check_pair(content: dict[str, Any], found: dict[str, str], folder: Path) -> None:
    """Refuse a map that was fitted to other models.

    Raises:
        InputError: naming what differs.
    """
    changed = differences(content.get("identity") or {}, found)
    if changed:
        name, (before, now) = next(iter(changed.items()))
        raise InputError(
            f"{folder}: its map was fitted to another {name} ({one_line(before)}, here {now}); expected the pair that "
            "it was fitted to (or `kvds handoff fit` anew)"
        )


def load_handoff(teacher: str, student: str, map_folder: Path | None = None, *, dtype: Any = "auto") -> HandoffModel:
    """Teacher, student and map, checked against each other.

    Args:
        teacher: Folder or hub name.
        student: Folder or hub name.
        map_folder: With the map; None: the student's own folder.
        dtype: Of both models; ``"auto"``: that of their files.

    Raises:
        InputError: one is missing, or they do not belong together.
    """
    tokenizer = one_tokenizer(teacher, student)
    folder = Path(student) if map_folder is None else map_folder
    cache_map, content = load_map(folder)
    check_pair(content, pair_identity(teacher, student, tokenizer), folder)
    return HandoffModel(*load_pair(teacher, student, tokenizer, dtype=dtype), cache_map)
