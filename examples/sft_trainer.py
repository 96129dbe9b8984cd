"""TRL's SFTTrainer with the KV loss: python examples/sft_trainer.py STUDENT TEACHER ROWS.jsonl OUTPUT."""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from kvds import AlignmentSettings, KVDistiller


class KVSFTTrainer(SFTTrainer):
    def __init__(self, student, teacher, alignment, **arguments):
        super().__init__(student, **arguments)
        self.distiller = KVDistiller(self.model, teacher, alignment)  # with the adapters that peft_config= asks for
        self.distiller.fit(self.get_train_dataloader())

    def create_optimizer(self, *arguments):
        super().create_optimizer(*arguments)
        self.optimizer.add_param_group({"params": list(self.distiller.aligner.parameters()), "weight_decay": 0.0})
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.distiller.watch(model) as forward:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        kv = forward.loss(inputs) / (1 if num_items_in_batch is None else self.current_gradient_accumulation_steps)
        self._metrics["train" if self.model.training else "eval"]["loss/kv"].append(float(forward.metrics["loss/kv"]))
        return (result[0] + kv, result[1]) if return_outputs else result + kv


student_name, teacher_name, rows, output = sys.argv[1:]
settings = SFTConfig(output, per_device_train_batch_size=4, max_steps=6, logging_steps=1, bf16=False, report_to="none")
trainer = KVSFTTrainer(
    AutoModelForCausalLM.from_pretrained(student_name), AutoModelForCausalLM.from_pretrained(teacher_name),
    AlignmentSettings(kv_parts="v"), args=settings, train_dataset=load_dataset("json", data_files=rows, split="train"),
)  # fmt: skip
trainer.train()
trainer.save_model()
