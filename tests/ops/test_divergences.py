"""Divergences at the head: their definitions in plain loops, and losses and gradients of chunks against autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvds.data.labels import LabelledPositions
from kvds.distillation.losses import head_losses
from kvds.ops import softmax_loss
from kvds.ops.divergences import Divergence
from kvds.ops.softmax_loss import softmax_losses_
from tests.harness.softmax_problems import softmax_problem

CASES = [
    Divergence(),
    Divergence("reverse_kl"),
    Divergence("jsd"),
    Divergence("jsd", beta=0.1),
    Divergence(top_k=3),
    Divergence("reverse_kl", top_k=5),
    Divergence("jsd", beta=0.9, top_k=1),
    Divergence(top_k=1000),  # more than there are
]


def oracle(student: list[float], teacher: list[float], how: Divergence) -> float:
    """Of one position's logits, token by token in Python's numbers."""

    def softmax(x: list[float]) -> list[float]:
        largest = max(x)
        shares = [math.exp(value - largest) for value in x]
        return [share / math.fsum(shares) for share in shares]

    q, p = softmax(student), softmax(teacher)
    if 0 < how.top_k < len(p):
        order = sorted(range(len(p)), key=lambda i: -p[i])
        top, rest = order[: how.top_k], order[how.top_k :]
        q, p = ([x[i] for i in top] + [math.fsum(x[i] for i in rest)] for x in (q, p))

    def kl(a: list[float], b: list[float]) -> float:
        return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    if how.kind == "forward_kl":
        return kl(p, q)
    if how.kind == "reverse_kl":
        return kl(q, p)
    m = [how.beta * x + (1 - how.beta) * y for x, y in zip(p, q, strict=True)]
    return how.beta * kl(p, m) + (1 - how.beta) * kl(q, m)


def name(how: Divergence) -> str:
    return f"{how.kind} {how.beta} {how.top_k}"


@pytest.mark.parametrize("how", CASES, ids=name)
def test_each_is_its_definition(how: Divergence) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(6, 17, generator=generator, dtype=torch.float64) for _ in range(2))
    found = how(student.log_softmax(1), teacher.log_softmax(1))
    expected = math.fsum(oracle(a, b, how) for a, b in zip(student.tolist(), teacher.tolist(), strict=True))
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert float(how(teacher.log_softmax(1), teacher.log_softmax(1))) == pytest.approx(0.0, abs=1e-12)


def test_a_token_that_nobody_takes_adds_nothing() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [2.0, 0.0, 1.0]], dtype=torch.float64)
    student = logits.clone().requires_grad_()
    for how in (Divergence(), Divergence("reverse_kl"), Divergence("jsd")):
        loss = how(student.log_softmax(1), logits.log_softmax(1))
        assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)


def whole(x: Tensor, teacher: Tensor, keywords: dict[str, Any], how: Divergence) -> Tensor:
    own, other = ((t[:, : keywords["vocab_size"]] / keywords["temperature"]).log_softmax(1) for t in (x, teacher))
    return how(own, other) * keywords["temperature"] ** 2


@pytest.mark.parametrize("how", CASES, ids=name)
def test_gradients_a_few_rows_at_a_time(how: Divergence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_loss, "_SLICE", 3 * 41)
    logits, target, teacher, keywords = softmax_problem(8, 41, 37, True, dtype=torch.float64)
    assert teacher is not None
    x = logits.clone().requires_grad_()
    task, apart = F.cross_entropy(x, target, reduction="sum"), whole(x, teacher, keywords, how)
    (keywords["task_scale"] * task + keywords["kd_scale"] * apart).backward()
    found = softmax_losses_(logits, target, teacher_logits=teacher, divergence=how, **keywords)
    torch.testing.assert_close(found, (task.detach(), apart.detach()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits, x.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("how", CASES[1:6], ids=name)
def test_chunks_at_the_head_of_vocabularies_that_differ_in_padding(how: Divergence, plain: bool) -> None:
    torch.manual_seed(0)
    student, teacher = nn.Linear(8, 40, dtype=torch.float64), nn.Linear(6, 44, bias=False, dtype=torch.float64)
    hidden = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    others = torch.randn(2, 5, 6, dtype=torch.float64)
    labels = torch.randint(0, 37, (2, 5))
    labelled = LabelledPositions.from_labels(labels)
    keywords: dict[str, Any] = {"vocab_size": 37, "temperature": 1.7}
    gradients = []
    for chunks in (1, 3):
        head = student if plain else lambda rows: 0.5 * student(rows).tanh()
        losses = head_losses(
            head, hidden, labelled, num_chunks=chunks, teacher_head=teacher, teacher_hidden=others, divergence=how,
            scale=0.2, task_weight=0.6, kd_weight=1.4, **keywords,
        )  # fmt: skip
        rows, taught = (x.flatten(0, 1)[labelled.index] for x in (hidden, others))
        logits = student(rows) if plain else 0.5 * student(rows).tanh()
        task = 0.2 * F.cross_entropy(logits, labelled.target, reduction="sum")
        apart = 0.2 * whole(logits, teacher(taught).detach(), keywords, how)
        # Where the model's own forward stands before the logits, losses are fp32.
        exact = {"rtol": 1e-10, "atol": 1e-10} if plain else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(losses.kd.double(), apart.detach(), **exact)
        torch.testing.assert_close(losses.task.double(), task.detach(), **exact)
        wanted = torch.autograd.grad(0.6 * task + 1.4 * apart, [hidden, student.weight])
        found = torch.autograd.grad(losses.loss, [hidden, student.weight])
        for one, same in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, same, **exact)
        gradients.append(found)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
