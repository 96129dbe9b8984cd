"""The page of families, made of what tests cover: ``python -m tests.harness.family_table`` writes it."""

from __future__ import annotations

from pathlib import Path

from kvds.kv.families import FAMILIES
from kvds.models.compiled_layers import COMPILED_FAMILIES
from tests.harness.heads_ranks import FAMILIES as DEALT_OUT
from tests.kv.test_capture import CONFIGS
from tests.kv.test_row_attention import CASES
from tests.models.test_quantized_gpu import QUANTIZED
from tests.training.test_adapters import ADAPTED

PAGE = Path(__file__).resolve().parents[2] / "docs/families.md"
HEAD = """# Model families

Task loss and logit distillation (`--alignment_mode none`) take any causal language model of transformers whose logits
are made of its backbone's output; whether they are is tried at the start on a small model of its configuration.
Nothing else is asked of it.

Keys and values are read where a family computes them. Of the families below tests hold them against the model's own
cache: values, keys before and after rotation, gradients, checkpointing, padding. Any other family that is built as
most are (a list of decoder layers, in each an attention with `q_proj`, `k_proj` and `v_proj`) is tried before its
weights are read, on a small random model of its configuration: it is taken where keys, values and attention are those
of the model itself, else refused by what was not found. Layers may differ in window and rotation. Layers that differ
in heads, that have no attention or that read another layer's keys and values are refused, with the reason.

| family | keys and values | rows shared | window | LoRA student | compiled | teacher in few bits | heads over ranks |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
TAIL = """
- *Rows shared*: `--packing` and `--tokens_per_batch`. A family that mixes the samples of a row gets a row for each.
- *Window*: tested with a sliding one, in all layers or in some. Where a family caps its attention logits (Gemma 2),
  they are made whole, sample by sample: correct, and slower than a kernel.
- *LoRA student*: `--lora_r` or `--lora_config` (`pip install 'kvds[lora]'`). `student/` holds the merged model,
  `adapter/` what `peft.PeftModel.from_pretrained` puts onto the student that the run began with.
- *Compiled*: `--compile`, of a student without adapters.
- *Teacher in few bits*: `--teacher_quantization 8bit` or `4bit` (`pip install 'kvds[quantization]'`), on a GPU, where
  the test runs, too. Other families are not tested with it.
- *Heads over ranks*: `--teacher_placement tensor_parallel`; any other placement takes every family.
- The router's own loss of a mixture of experts (Mixtral, Qwen3-MoE) is no part of what is trained.

Made of the tests by `python -m tests.harness.family_table`.
"""


def page() -> str:
    """The whole file."""
    windowed = {family for family, window in CASES if window is not None}
    rows = {family for family, _ in CASES}
    columns = [set(CONFIGS), rows, windowed, set(ADAPTED), COMPILED_FAMILIES, QUANTIZED, DEALT_OUT]
    lines = []
    for family in sorted(FAMILIES):
        cells = ["yes" if family in column else "–" for column in columns]
        lines.append(f"| `{family}` | {' | '.join(cells)} |\n")
    return HEAD + "".join(lines) + TAIL


if __name__ == "__main__":
    PAGE.write_text(page())
