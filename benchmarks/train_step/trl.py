"""TRL's ``GKDTrainer`` on the same models and batches: ``python -m benchmarks.train_step.trl SPEC.pt``, run by
``benchmarks.train_step.bench``.

Off-policy (``lmbda=0``), forward KL (``beta=0``), no clipping, fused AdamW. Reads one batch number per line, does one
training step on it and answers with a line of JSON: seconds per phase, loss, peak memory in bytes.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from datasets import Dataset

from benchmarks.memory_peak import MemoryPeak
from benchmarks.train_step.workbench import Clock, build_model, held_bytes


def _trainer(spec: dict[str, Any], device: torch.device, folder: str) -> Any:
    try:
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    except ImportError:
        from trl import GKDConfig, GKDTrainer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if spec["tokenizer"] is not None:
        tokenizer = AutoTokenizer.from_pretrained(spec["tokenizer"])
    else:
        from tokenizers import Tokenizer, models

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), pad_token="a", eos_token="b"
        )
    arguments = GKDConfig(
        output_dir=folder, lmbda=0.0, beta=0.0, temperature=1.0, per_device_train_batch_size=spec["batch_size"],
        gradient_checkpointing=False, max_grad_norm=0.0, optim="adamw_torch_fused", learning_rate=spec["lr"],
        report_to=[], use_cpu=device.type == "cpu", bf16=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    student = build_model(spec["student"], spec["dtype"], device, 2)
    teacher = build_model(spec["teacher"], spec["dtype"], device, 1)
    return GKDTrainer(
        model=student, teacher_model=teacher, args=arguments, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"input_ids": [0, 1]}]), data_collator=lambda rows: rows,
    )  # fmt: skip


def main() -> None:
    spec = torch.load(sys.argv[1], weights_only=False)
    answers, sys.stdout = sys.stdout, sys.stderr
    device = torch.device(spec["device"])
    memory = MemoryPeak(device)
    clock = Clock(device, spec["clock"])
    trainer = _trainer(spec, device, spec["folder"])
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # what train() sets before its loop
    model = trainer.model
    held = held_bytes(trainer.teacher_model) + 3 * held_bytes(model)
    import accelerate
    import transformers
    import trl

    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "accelerate": accelerate.__version__}
    print(json.dumps({"ready": versions}), file=answers, flush=True)
    for line in sys.stdin:
        batch = spec["batches"][int(line)]
        memory.begin()
        with clock.phase("forward"):  # with its backward: one call of the trainer does both
            loss = trainer.training_step(model, {name: tensor.to(device) for name, tensor in batch.items()})
        with clock.phase("optimizer"):
            trainer.optimizer.step()
            trainer.optimizer.zero_grad(set_to_none=True)
        answer = {"seconds": clock.read(), "loss": float(loss), "peak": memory.end(held)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
