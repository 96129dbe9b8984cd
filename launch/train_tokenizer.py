"""Train a small byte-level BPE tokenizer on the training rows of a corpus, in the form that Qwen2 models load.

python launch/train_tokenizer.py --datasets gsm8k --data_dir DATA --vocab_size 4096 --output outputs/gsm8k_tokenizer

The folder also gets the configuration of a small model with this vocabulary, so that it serves as --student_name with
--student_init random and whatever --student_config_overrides says.

A vocabulary of 151,936 entries makes up nearly all of a model of a few million parameters; one of its own makes
experiments on real text affordable.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvds.data.example import completion_text, prompt_text
from kvds.data.mixture import load_mixture
from kvds.errors import InputError

PAD, END = "<|pad|>", "<|endoftext|>"


def train_tokenizer(texts: list[str], vocab_size: int, output: Path) -> int:
    """Learn ``vocab_size`` pieces from ``texts`` with Qwen2's own splitting rule and write the folder; the same texts
    give the same tokenizer.

    Returns:
        Entries of the vocabulary.
    """
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2Tokenizer

    template = Qwen2Tokenizer(vocab={PAD: 0, END: 1}, merges=[], unk_token=None, eos_token=END, pad_token=PAD)
    model = Tokenizer(models.BPE())
    model.normalizer = template.backend_tokenizer.normalizer
    model.pre_tokenizer = template.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, END], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    learned = json.loads(model.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=merges, unk_token=None, eos_token=END, pad_token=PAD)
    tokenizer.save_pretrained(output)
    Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, use_cache=False,
    ).save_pretrained(output)  # fmt: skip
    return len(tokenizer)


def main() -> int:
    """Parse flags, train, say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=["gsm8k"])
    parser.add_argument("--data_dir")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        if arguments.vocab_size < 258:
            raise InputError(f"--vocab_size {arguments.vocab_size}: expected at least 258, 256 bytes and two marks")
        rows = load_mixture(arguments.datasets, "train", data_dir=arguments.data_dir).examples
    except InputError as error:
        print(f"kvds: error: {error}", file=sys.stderr)
        return 2
    texts = [prompt_text(row) + completion_text(row) for row in rows]
    size = train_tokenizer(texts, arguments.vocab_size, arguments.output)
    print(f"{size} entries from {len(rows)} rows in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
