"""A Trainer with the KV loss beside its own: python examples/trainer.py STUDENT TEACHER ROWS.jsonl OUTPUT."""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from kvds import AlignmentSettings, KVDistiller


class KVTrainer(Trainer):
    def __init__(self, distiller, **arguments):
        super().__init__(model=distiller.student, **arguments)
        self.distiller = distiller
        distiller.fit(self.get_train_dataloader())  # on the device of the trainer

    def create_optimizer(self, *arguments):
        super().create_optimizer(*arguments)
        self.optimizer.add_param_group({"params": list(self.distiller.aligner.parameters()), "weight_decay": 0.0})
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.distiller.watch(model) as forward:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # The trainer divides by the micro-batches of a step where its own loss is a mean over one of them.
        steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        loss = loss + forward.loss(inputs) / steps
        return (loss, outputs) if return_outputs else loss


student_name, teacher_name, rows, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(student_name)
student, teacher = (AutoModelForCausalLM.from_pretrained(name) for name in (student_name, teacher_name))
encoded = load_dataset("json", data_files=rows, split="train").map(
    lambda row: (ids := tokenizer(row["prompt"] + row["completion"])["input_ids"]) and {"input_ids": ids, "labels": ids}
)
settings = TrainingArguments(output, per_device_train_batch_size=4, max_steps=6, logging_steps=1, report_to="none")
distiller = KVDistiller(student, teacher, AlignmentSettings(kv_parts="v"))
KVTrainer(distiller, args=settings, train_dataset=encoded, data_collator=DataCollatorForSeq2Seq(tokenizer)).train()
student.save_pretrained(output)
