"""A loop by hand: accelerate launch examples/accelerate_loop.py STUDENT TEACHER ROWS.jsonl OUTPUT."""

import sys

import torch
from accelerate import Accelerator
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvds import AlignmentSettings, KVDistiller

student_name, teacher_name, rows, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(student_name, padding_side="right")
student, teacher = (AutoModelForCausalLM.from_pretrained(name) for name in (student_name, teacher_name))


def collate(batch):
    encoded = tokenizer([row["prompt"] + row["completion"] for row in batch], padding=True, return_tensors="pt")
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}


accelerator = Accelerator(gradient_accumulation_steps=2)
data = load_dataset("json", data_files=rows, split="train")
loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, collate_fn=collate)
distiller = KVDistiller(student, teacher, AlignmentSettings(kv_parts="v")).to(accelerator.device)
distiller.fit(loader)
optimizer = torch.optim.AdamW(distiller.parameters(), lr=5e-5)  # student and aligner
distiller, optimizer, loader = accelerator.prepare(distiller, optimizer, loader)
for epoch in range(3):
    for batch in loader:
        with accelerator.accumulate(distiller):
            result = distiller(**batch)
            accelerator.backward(result.loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(epoch, {name: round(float(value), 4) for name, value in result.metrics.items()})
accelerator.unwrap_model(distiller).student.save_pretrained(output)
