"""Weight check: every tensor of a folder has its place in the model, or is explained, or the folder is refused.

transformers leaves out what a configuration has no place for and keeps a head that differs from the embeddings which
the configuration ties it to, with a warning at most: a run would train or judge another model than the folder holds.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from kvds.errors import InputError, one_line
from kvds.models.weight_files import StoredTensor, UnusableWeights, stored_tensors

log = logging.getLogger("kvds")

# Tensors of old files that hold no weights: models compute them anew from their configuration.
_COMPUTED = re.compile(r"(^|\.)attn\.(masked_)?bias$|(^|\.)rotary_emb\.inv_freq$")
_FLOATING = {"F64", "F32", "F16", "BF16"}
# Rows of two tensors that are compared at once.
_ROWS = 4096


def check_weights(folder: Path, config: PreTrainedConfig, place: str, *, remedy: str = "") -> None:
    """Compare the weight files of ``folder`` with the model of ``config``; their headers are read, and no weights but
    a head stored beside the embeddings that it is tied to.

    Args:
        folder: Of the model.
        config: Its architecture, overrides applied.
        place: What the user gave, such as ``--student_name=FOLDER``, for messages.
        remedy: Another way out, such as ``or --student_init random``.

    Raises:
        InputError: files that are missing, damaged, surplus or no safetensors; tensors that the model lacks, has in
            other shapes or has no place for; layers overridden.
    """
    own = check_layers(folder, config, place, remedy=remedy)
    if getattr(config, "quantization_config", None):
        raise InputError(
            f"{place}: its weights are quantized ({one_line(config.quantization_config)}); expected plain "
            f"floating-point weights{_or(remedy)}"
        )
    try:
        tensors = stored_tensors(folder)
    except UnusableWeights as error:
        raise InputError(f"{place}: the folder holds no loadable model with weights ({error}){_or(remedy)}") from error
    model, missing, strangers, mismatched = _placed(config, tensors)
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise InputError(
            f"{place}: its weights do not have the shapes of its configuration (first of {len(mismatched)}: {name} is "
            f"{list(stored)}, not {list(wanted)}); expected matching files{_or(remedy)}"
        )
    if strangers and own.to_dict() != config.to_dict():
        home = _homes(_on_meta(own))
        explained = [name for name in strangers if home(name) is not None]
        if explained:
            log.warning("%s: an override leaves out %d of its tensors (first: %s)", place, len(explained), explained[0])
        strangers = [name for name in strangers if name not in explained]
    faults = ((missing, "weights are missing"), (strangers, "tensors have no place in its configuration"))
    told = [f"{len(names)} {what} (first: {names[0]})" for names, what in faults if names]
    if told:
        raise InputError(f"{place}: {' and '.join(told)}; expected a whole model and its own config.json{_or(remedy)}")
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATING and not _COMPUTED.search(name):
            raise InputError(
                f"{place}: {name} is stored as {tensor.dtype}; expected plain floating-point weights{_or(remedy)}"
            )
    _check_tied(model, tensors, place, remedy)


def check_layers(folder: Path, config: PreTrainedConfig, place: str, *, remedy: str = "") -> PreTrainedConfig:
    """Refuse another number of layers than the weights of ``folder`` have; returns the folder's own configuration.

    Raises:
        InputError: the number is overridden.
    """
    own = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    stored, wanted = (getattr(made.get_text_config(), "num_hidden_layers", None) for made in (own, config))
    if stored != wanted:
        raise InputError(
            f"{place}: num_hidden_layers={wanted} for pretrained weights of {stored} layers; expected all of them; "
            f"to make a student of fewer layers, use kvds prune{_or(remedy)}"
        )
    return own


def check_finite(folder: Path, place: str, *, remedy: str = "") -> None:
    """Refuse weights that are not numbers: reads every tensor of ``folder`` once, a few rows at a time.

    Raises:
        InputError: a tensor holds NaN or infinity.
    """
    for tensor in stored_tensors(folder).values():
        if tensor.dtype not in _FLOATING or _COMPUTED.search(tensor.name):
            continue
        with safe_open(tensor.file, "pt") as weights:
            bad = sum(int((~torch.isfinite(piece)).sum()) for piece in _pieces(weights, tensor))
        if bad:
            raise InputError(
                f"{place}: {tensor.name} holds {bad} numbers that are NaN or infinite; expected finite weights (the "
                f"file as its publisher has it, or a state from before its training went wrong){_or(remedy)}"
            )


def _pieces(weights: Any, tensor: StoredTensor) -> Iterator[torch.Tensor]:
    """A stored tensor, a few rows at a time."""
    if not tensor.shape:
        yield weights.get_tensor(tensor.name)
        return
    rows = weights.get_slice(tensor.name)
    for start in range(0, tensor.shape[0], _ROWS):
        yield rows[start : start + _ROWS]


def _or(remedy: str) -> str:
    return f" ({remedy})" if remedy else ""


def _placed(
    config: PreTrainedConfig, tensors: dict[str, StoredTensor]
) -> tuple[Any, list[str], list[str], list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """The model on the meta device, and what is missing, has no place and has another shape there: transformers' own
    rules for prefixes and old names, applied to tensors without contents.
    """
    model = _on_meta(config)
    empty = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    with _silent():
        loaded, info = type(model).from_pretrained(
            None, config=config, state_dict=empty, device_map="meta", output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    strangers = {name for name in info["unexpected_keys"] if not _COMPUTED.search(name)}
    home, taken = _homes(model), dict[str, str]()
    # Patterns by which transformers keeps quiet also fit what is no such buffer: a bias of a surplus layer.
    quiet = re.compile("|".join(f"({pattern})" for pattern in loaded._keys_to_ignore_on_load_unexpected or ["(?!)"]))
    for name in tensors:
        place = home(name)
        if place is None and quiet.search(name) and not _COMPUTED.search(name):
            strangers.add(name)
        elif place is not None and taken.setdefault(place, name) != name:
            strangers.add(name)  # with and without the prefix: one of the two would win
    return loaded, sorted(info["missing_keys"]), sorted(strangers), sorted(info["mismatched_keys"])


def _on_meta(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _homes(model: Any) -> Callable[[str], str | None]:
    """From a stored name to the model's, or None: files of a bare backbone have names without its prefix."""
    prefix, known = f"{model.base_model_prefix}.", set(model.state_dict())

    def home(name: str) -> str | None:
        return next((place for place in (name, prefix + name, name.removeprefix(prefix)) if place in known), None)

    return home


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def _check_tied(model: Any, tensors: dict[str, StoredTensor], place: str, remedy: str) -> None:
    """Refuse two different tensors where the configuration says that they are one."""
    home = _homes(model)
    stored = {home(name): tensor for name, tensor in tensors.items()}
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        head, embeddings = stored.get(target), stored.get(source)
        if head is not None and embeddings is not None and not _equal(head, embeddings):
            raise InputError(
                f"{place}: {head.name} differs from {embeddings.name}, and its configuration ties them; expected "
                '"tie_word_embeddings": false in config.json, for a model that keeps its own head, or a file without '
                f"that head{_or(remedy)}"
            )


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two stored tensors hold the same numbers; a few rows at a time are read."""
    if first.shape != second.shape:
        return False
    with safe_open(first.file, "pt") as one, safe_open(second.file, "pt") as other:
        rows = one.get_slice(first.name), other.get_slice(second.name)
        return all(
            torch.equal(*(part[start : start + _ROWS].double() for part in rows))
            for start in range(0, first.shape[0], _ROWS)
        )
