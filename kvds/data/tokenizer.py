"""A tokenizer of whole words for the built-in problems, trained with sentencepiece."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvds.data.example import Example, completion_text, prompt_text
from kvds.data.synthetic import ITEMS, NAMES, synthetic_examples

_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"
_SPACE = "▁"  # sentencepiece's sign for the blank before a word


def train_problem_tokenizer(folder: str | Path) -> None:
    """Train on generated problems and write a folder that ``AutoTokenizer.from_pretrained`` loads; the same each time.

    sentencepiece learns the pieces and their scores as a unigram model in which no piece crosses a blank; transformers
    reads the same pieces and scores through its fast tokenizer.
    """
    lines = [text for example in synthetic_examples("train", problems=2000, seed=0) for text in _lines(example)]
    random.Random(0).shuffle(lines)
    with tempfile.TemporaryDirectory() as scratch:
        corpus, prefix = Path(scratch) / "problems.txt", Path(scratch) / "model"
        corpus.write_text("\n".join(lines))
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(prefix), model_type="word", vocab_size=500, hard_vocab_limit=False,
            normalization_rule_name="identity", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece=_PAD, eos_piece=_END,
            unk_piece=_UNKNOWN, num_threads=1, minloglevel=2,
        )  # fmt: skip
        pieces = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
        vocabulary = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    missing = [word for word in (*NAMES, *ITEMS) if _SPACE + word not in vocabulary]
    if missing:
        raise RuntimeError(f"the trained vocabulary lacks {missing}")
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END, unk_token=_UNKNOWN, clean_up_tokenization_spaces=False
    )
    # sentencepiece reads line by line and never sees a line end.
    fast.add_tokens([AddedToken("\n", normalized=False, special=False)])
    fast.save_pretrained(folder)


def _lines(example: Example) -> list[str]:
    return (prompt_text(example) + completion_text(example)).splitlines()
