"""Tokenizers that drop, replace, compose, fold or know all letters, and texts in all of Unicode's blocks."""

from __future__ import annotations

import os
import string
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = sorted({*string.ascii_letters, *string.digits, *" \n#.=+-<|>_", "é", "\u0301", "ﬁ", "²"})
NORMALIZERS = {"none": None, "nfc": normalizers.NFC(), "nfkc": normalizers.NFKC(), "lower": normalizers.Lowercase()}
EXAMPLES = os.environ.get("KVDS_FUZZ_EXAMPLES")
# Of each kind and normalizer; as in tests/hostile/test_fuzz_input.py the same ones unless more are asked for.
fuzzed = settings(max_examples=int(EXAMPLES or 40), derandomize=EXAMPLES is None, deadline=None)
KINDS = ("letters", "unknown", "bytes", "byte_fallback")


def made(kind: str, normalizer: str = "none") -> Any:
    """A tokenizer that drops what it does not know, puts a token there, or knows every byte."""
    special = ["<|end|>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate(special)}
    if kind == "bytes":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    elif kind == "byte_fallback":
        letters = [*LETTERS, *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        letters = LETTERS
    for letter in letters:
        vocabulary.setdefault(letter, len(vocabulary))
    unknown = "<unk>" if kind in ("unknown", "byte_fallback") else None
    fallback = kind == "byte_fallback"
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown, byte_fallback=fallback))
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    elif kind == "byte_fallback":
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    else:
        backend.decoder = decoders.Fuse()
    if NORMALIZERS[normalizer] is not None:
        backend.normalizer = NORMALIZERS[normalizer]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        pad_token="<|end|>",
        **({"unk_token": unknown} if unknown else {}),
    )


# Every block of Unicode; two letters of three are such as tokenizers know, compose, fold or lose.
_PIECES = st.sampled_from([*"ab1 \n\r\t#é\u0301\u200bﬁ²한각$*Y", "\N{ANGSTROM SIGN}", "e\u0301", "<|end|>", "####"])
_ANY = st.characters(exclude_categories=["Cs"])
TEXT = st.lists(st.one_of(_PIECES, _PIECES, _ANY), max_size=12).map("".join)
