"""A small tokenizer for the built-in problems: pieces learned by sentencepiece, in the form that Qwen2 models load.

transformers reads any tokenizer beside a Qwen2 model as Qwen2's own kind, byte-level pairs behind a fixed splitting
rule. So the pieces of a sentencepiece BPE model are written in that form: an exported student then loads with plain
``AutoTokenizer.from_pretrained``. Each word of the problems becomes one token, each digit one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import sentencepiece
from transformers import Qwen2Tokenizer

from kvds.data.example import ANSWER_MARK, completion_text, prompt_text
from kvds.data.synthetic import GAINS, ITEMS, LOSSES, NAMES, synthetic_examples

_PAD, _END = "<|pad|>", "<|endoftext|>"
# sentencepiece's sign for a blank and byte-level BPE's; a line end is never inside a piece.
_SPACE, _BYTE_SPACE, _BYTE_LINE_END = "▁", "Ġ", "Ċ"
_PIECES = 400


def train_problem_tokenizer(folder: str | Path) -> None:
    """Train on generated problems; write a folder that ``AutoTokenizer.from_pretrained`` loads, the same each time."""
    problems = synthetic_examples("train", problems=2000, seed=0)
    texts = (prompt_text(example) + completion_text(example) for example in problems)
    with tempfile.TemporaryDirectory() as scratch:
        corpus, prefix = Path(scratch) / "problems.txt", Path(scratch) / "model"
        corpus.write_text("".join(f"{text}\n" for text in texts))
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(prefix), model_type="bpe", vocab_size=_PIECES, hard_vocab_limit=False,
            normalization_rule_name="identity", add_dummy_prefix=False, split_digits=True, num_threads=1, minloglevel=2,
        )  # fmt: skip
        model = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
        ids = range(model.get_piece_size())
        pieces = [model.id_to_piece(i) for i in ids if not model.is_control(i) and not model.is_unknown(i)]
    pieces = [piece.replace(_SPACE, _BYTE_SPACE) for piece in pieces]
    letters = sorted({*"".join(pieces), _BYTE_LINE_END})
    merged = [piece for piece in pieces if len(piece) > 1]
    vocabulary = {piece: i for i, piece in enumerate([_PAD, _END, *letters, *merged])}
    # Every way to put a piece together from two known ones, in the order in which the pieces were learned.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in merged
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, unk_token=None, eos_token=_END, pad_token=_PAD)
    words = [*NAMES, *(f" {word}" for word in (*ITEMS, *GAINS, *LOSSES, "has")), ANSWER_MARK]
    split = [word for word in words if len(tokenizer.tokenize(word)) != 1]
    if split:
        raise RuntimeError(f"the trained tokenizer splits {split}; expected one token each")
    tokenizer.save_pretrained(folder)
