"""The built-in corpus: word problems of two or three additions or subtractions with a written rationale.

``Lee has 68 balls eats 2 sells 1?`` → ``68-2=48-1=38`` → ``38``: totals from 0 to 99 in two digits, **the lower one
first** (68 is eighty-six), so that each step can be computed left to right. No more than 40 tokens, a digit or a word
each.
"""

from __future__ import annotations

import random

from kvds.data.example import Example

NAMES = ("Lee", "Ann", "Bob", "Eva", "Tom", "Zoe", "Max", "Ida")
ITEMS = ("balls", "books", "coins", "cards", "eggs", "nuts", "pens", "cups")
GAINS = ("buys", "finds", "gets", "wins")
LOSSES = ("eats", "sells", "gives", "loses")
EVAL_PROBLEMS = 2000
_EVAL_SEED = 20_240_601


def _digits(total: int) -> str:
    return f"{total % 10}{total // 10}"


def problem(rng: random.Random) -> tuple[str, str, str]:
    """Draw one problem: prompt, rationale and answer."""
    total = rng.randrange(100)
    prompt = [f"{rng.choice(NAMES)} has {_digits(total)} {rng.choice(ITEMS)}"]
    steps = [_digits(total)]
    for _ in range(rng.choice((2, 3))):
        amount = rng.randint(1, 9)
        gain = rng.random() < 0.5
        if not 0 <= total + (amount if gain else -amount) <= 99:
            gain = not gain
        total += amount if gain else -amount
        prompt.append(f"{rng.choice(GAINS if gain else LOSSES)} {amount}")
        steps.append(f"{'+' if gain else '-'}{amount}={_digits(total)}")
    return " ".join(prompt) + "?", "".join(steps), _digits(total)


def _draw(count: int, seed: int, without: set[str], place: str) -> list[Example]:
    rng = random.Random(seed)
    examples: list[Example] = []
    seen = set(without)
    while len(examples) < count:
        prompt, rationale, answer = problem(rng)
        if prompt not in seen:
            seen.add(prompt)
            examples.append(Example(prompt, rationale, answer, "synthetic", f"{place}:{len(examples) + 1}"))
    return examples


def synthetic_examples(split: str, *, problems: int, seed: int) -> list[Example]:
    """Distinct problems, the same for the same arguments on every machine.

    Args:
        split: ``"train"``: ``problems`` of them, drawn by ``seed``, none a held-out one; ``"eval"``: always the same
            2000.
        problems: How many to train on.
        seed: Of the training problems.
    """
    held_out = _draw(EVAL_PROBLEMS, _EVAL_SEED, set(), "synthetic-eval")
    if split == "eval":
        return held_out
    return _draw(problems, seed, {example.prompt for example in held_out}, "synthetic-train")
