"""Models, rows and clocks of ``benchmarks.train_step.bench``: what every way of training is given alike."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from kvds.data.batches import TokenBatch
from kvds.data.encoding import EncodedSample, encode_examples
from kvds.data.loader import BatchLoader
from kvds.data.mixture import load_mixture
from kvds.kv import selected_count
from kvds.kv.row_attention import run_attention

# Dense bf16 peak in FLOP/s, from the vendor's data sheet (SXM).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Pair:
    """A teacher and a student, and how they are run.

    Attributes:
        teacher: Configuration, vocabulary as the student's.
        student: Configuration.
        dtype: Of parameters and activations.
    """

    teacher: Any
    student: Any
    dtype: torch.dtype


def _small(layers: int, hidden: int, vocab: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        use_sliding_window=False,
    )  # fmt: skip


def make_pair(name: str, data_dir: Path, dtype: str | None) -> Pair:
    """``tiny``, ``small``, ``small_152k`` (by their vocabulary of 512, 8192 and 151936) or ``qwen2``."""
    if name == "qwen2":
        teacher, student = (
            AutoConfig.from_pretrained(data_dir / "models" / f"qwen2-{size}") for size in ("1.5b", "0.5b")
        )
    elif name == "tiny":
        teacher, student = _small(3, 32, 512), _small(2, 16, 512)
    else:
        vocab = {"small": 8192, "small_152k": 151936}[name]
        teacher, student = _small(8, 256, vocab), _small(6, 128, vocab)
    default = "bf16" if name == "qwen2" and torch.cuda.is_available() else "fp32"
    return Pair(teacher, student, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype or default])


def build_model(config: Any, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """Random weights, made on ``device``."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=run_attention("sdpa"))


def load_samples(data_dir: Path | None, vocab: int, max_length: int, count: int) -> tuple[list[EncodedSample], str]:
    """``count`` rows and what they are.

    Real GSM8K text under Qwen2's tokenizer where ``data_dir`` holds both; ids beyond a smaller vocabulary are folded
    into it, so that lengths and segments stay real. Else rows of random ids with lengths drawn like GSM8K's.
    """
    if data_dir is not None and (data_dir / "gsm8k").is_dir():
        tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "qwen2")
        examples = load_mixture(("gsm8k",), "train", data_dir=str(data_dir), subset_size=count, seed=0).examples
        samples = encode_examples(examples, tokenizer, max_length).samples
        folded = [EncodedSample(tuple(i % vocab for i in s.input_ids), s.segment_ids, s.example) for s in samples]
        return folded, "gsm8k"
    draw = random.Random(0)
    rows = []
    for number in range(count):
        # Question and solution of GSM8K under Qwen2's tokenizer: log-normal, medians of about 55 and 110 tokens.
        prompt = max(4, round(math.exp(draw.gauss(4.0, 0.35))))
        answer = max(8, round(math.exp(draw.gauss(4.7, 0.45))))
        prompt, answer = min(prompt, max_length // 3), min(answer, max_length // 2)
        ids = tuple(draw.randrange(vocab) for _ in range(prompt + answer))
        rows.append(EncodedSample(ids, (1,) * prompt + (2,) * (answer - 6) + (3,) * 6, number))
    return rows, "lengths like gsm8k"


def make_loader(samples: list[EncodedSample], batch_size: int, **how: Any) -> BatchLoader:
    """Batches of one rank in training order."""
    return BatchLoader(
        samples, batch_size=batch_size, gradient_accumulation_steps=1, rank=0, world_size=1, seed=0, pad_token_id=0,
        position_count=lambda length: selected_count("full", None, length), **how,
    )  # fmt: skip


def real_tokens(batch: TokenBatch) -> int:
    """Tokens of rows, padding not counted."""
    return int((batch.segment_ids != 0).sum())


class Clock:
    """Seconds per phase of one step: CUDA events on a GPU; on the CPU the process's own CPU time or the wall's.

    With one thread and no device to wait for, CPU time is what the step would take on a machine without neighbours.
    """

    def __init__(self, device: torch.device, kind: str | None = None) -> None:
        self._cuda = device.type == "cuda"
        alone = not self._cuda and torch.get_num_threads() == 1
        self.kind = "cuda_events" if self._cuda else kind or ("cpu_time" if alone else "wall")
        self._now = time.process_time if self.kind == "cpu_time" else time.perf_counter
        self._phases: list[tuple[str, Any, Any]] = []

    def _mark(self) -> Any:
        if not self._cuda:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside as ``name``; phases may nest."""
        begin = self._mark()
        yield
        self._phases.append((name, begin, self._mark()))

    def read(self) -> dict[str, float]:
        """Seconds per phase since the last call; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for name, begin, end in self._phases:
            spent = begin.elapsed_time(end) / 1000 if self._cuda else end - begin
            seconds[name] = seconds.get(name, 0.0) + spent
        self._phases.clear()
        return seconds


def layer_parameters(config: Any) -> int:
    """Weights of one Qwen2 layer's matrices."""
    width, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    attention = 2 * width * head * (config.num_attention_heads + config.num_key_value_heads)
    return attention + 3 * width * inner


def needed_flops(config: Any, batch: TokenBatch, *, train: bool, head: bool) -> float:
    """Floating point operations that a model cannot do without on the real tokens of ``batch``.

    ``2 · weights`` per token and pass for matrices, ``2 · 2 · width`` per pair of a query and a key before it, the head
    at labelled positions only; a backward pass counts twice a forward pass.
    """
    lengths = [int(n) for n in (batch.segment_ids != 0).sum(1)]
    labelled = int((batch.labels != -100).sum())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = sum(n * (n + 1) / 2 for n in lengths) * config.num_attention_heads * head_dim
    total = config.num_hidden_layers * (2 * layer_parameters(config) * sum(lengths) + 4 * pairs)
    if head:
        total += 2 * config.hidden_size * config.vocab_size * labelled
    return total * (3 if train else 1)


def device_name(device: torch.device) -> str:
    """The card, or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()} x{torch.get_num_threads()}"
    return f"cpu x{torch.get_num_threads()}"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The card's dense bf16 peak, FLOP/s; None where it is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), None)


def held_bytes(*modules: nn.Module | None) -> int:
    """Parameters and buffers."""
    return sum(t.nbytes for module in modules if module is not None for t in (*module.parameters(), *module.buffers()))
