"""Rows for ``test_fuzz_input.py``: valid ones of each corpus with what they must be read as, and nearly valid ones."""

import json
import re
import string
from decimal import Decimal

from hypothesis import strategies as st

from kvds.data.corpora import CORPORA
from kvds.data.example import is_blank

Parts = tuple[str, str, str, str | None]

GOOD_ROWS: dict[str, dict] = {
    "gsm8k": {"question": "q", "answer": "s #### 1"},
    "svamp": {"ID": "chal-1", "Body": "b", "Question": "q", "Equation": "( 1 )", "Answer": 1},
    "strategyqa": {"question": "q", "facts": ["f"], "answer": True},
    "arc_easy": {"question": {"stem": "s", "choices": [{"label": c, "text": c} for c in "ABC"]}, "answerKey": "A"},
    "own": {"prompt": "p", "rationale": "r", "answer": "a"},
}
DATA_FILES = {"own": "rows.jsonl"} | {name: CORPORA[name].files["train"] for name in GOOD_ROWS if name != "own"}

_FIELDS = sorted({*(key for row in GOOD_ROWS.values() for key in row), "stem", "choices", "label", "text"})
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(
    SCALARS | st.sampled_from(["A", "B", "1", "#### 1", "chal-3"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(_FIELDS), inner, max_size=8),
    max_leaves=12,
)

# No blanks at the ends, which readers take away, and neither the answer mark nor the calculator's brackets.
TEXT = (
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="#<>"), min_size=1, max_size=30)
    .map(str.strip)
    .filter(lambda text: not is_blank(text))
)
LINE = TEXT.map(lambda text: " ".join(text.split())).filter(lambda text: not is_blank(text))


@st.composite
def _numbers(draw: st.DrawFn) -> tuple[str, str]:
    """A number as a publisher may write it, and as it must be read."""
    whole, decimals = draw(st.integers(-(10**12), 10**12)), draw(st.text(string.digits, max_size=4))
    written = f"{whole:,}" if draw(st.booleans()) else str(whole)
    fraction = decimals.rstrip("0")
    read = f"{whole}.{fraction}" if fraction else str(whole)
    return (f"{written}.{decimals}" if decimals or draw(st.booleans()) else written), read


@st.composite
def _gsm8k(draw: st.DrawFn) -> tuple[dict, Parts]:
    question, before, after, (written, read) = draw(TEXT), draw(TEXT), draw(TEXT), draw(_numbers())
    annotation = draw(st.sampled_from(["", "<<2*3=6>>", "<<>>"]))
    row = {"question": f" {question}\n", "answer": f"{before}{annotation}{after}\n#### {written}"}
    return row, (question, before + after, read, None)


@st.composite
def _svamp(draw: st.DrawFn) -> tuple[dict, Parts]:
    body, question = draw(TEXT), draw(TEXT)
    a, b, c = (draw(st.integers(0, 10**6)) for _ in range(3))
    inner = draw(st.sampled_from(["+", "-", "*", "/"]))
    outer = draw(st.sampled_from(["+", "-"]))
    nested = draw(st.booleans())
    equation = f"( {a}.0 {outer} ( {b}.0 {inner} {c}.0 ) )" if nested else f"( {a}.0 {outer} {b}.0 )"
    steps = f"{a} {outer} ( {b} {inner} {c} )" if nested else f"{a} {outer} {b}"
    answer = draw(st.integers(0, 10**6)) + draw(st.sampled_from([0, 0.5, 0.25]))
    read = str(Decimal(str(answer)))
    row = {"ID": f"chal-{draw(st.integers(1, 700))}", "Body": body, "Question": question, "Equation": equation}
    joined = f"{body} {question}" if body[-1] in ".?!," else f"{body}. {question}"
    return {**row, "Answer": draw(st.sampled_from([answer, float(answer), read]))}, (
        joined,
        f"{steps} = {read}",
        read,
        None,
    )


@st.composite
def _strategyqa(draw: st.DrawFn) -> tuple[dict, Parts]:
    question, facts, answer = draw(TEXT), draw(st.lists(LINE, max_size=4)), draw(st.booleans())
    row = {"question": question, "facts": [f"{fact}\n" for fact in facts], "answer": answer}
    return row, (question, "\n".join(facts), "yes" if answer else "no", None)


@st.composite
def _arc(draw: st.DrawFn) -> tuple[dict, Parts]:
    stem, texts = draw(TEXT), draw(st.lists(TEXT, min_size=3, max_size=5))
    labels = draw(st.sampled_from(["ABCDE", "12345"]))[: len(texts)]
    right = draw(st.integers(0, len(texts) - 1))
    pairs = list(zip(labels, texts, strict=True))
    publisher = {"question": {"stem": stem, "choices": [{"label": label, "text": text} for label, text in pairs]}}
    hub = {"question": stem, "choices": {"label": list(labels), "text": texts}}
    row = {**draw(st.sampled_from([publisher, hub])), "answerKey": labels[right]}
    prompt = "\n".join([stem, *(f"{letter}. {text}" for letter, text in zip("ABCDE", texts, strict=False))])
    return row, (prompt, "", "ABCDE"[right], None)


@st.composite
def _own(draw: st.DrawFn) -> tuple[dict, Parts]:
    prompt, rationale = draw(TEXT), draw(st.none() | st.just("") | TEXT)
    teacher = draw(st.none() | TEXT)
    number = draw(st.none() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False))
    if number is None:
        answer = draw(TEXT)
        read = re.sub(r"\r\n?", "\n", answer)
    else:
        answer, read = number, f"{Decimal(repr(number)):f}"
        read = read.rstrip("0").rstrip(".") if "." in read else read
        read = "0" if read == "-0" else read
    row = {"prompt": prompt, "rationale": rationale, "answer": answer, "teacher_rationale": teacher, "id": 3}
    return {k: v for k, v in row.items() if v is not None}, (prompt, rationale or "", read, teacher)


def valid_rows(corpus: str) -> st.SearchStrategy[tuple[dict, Parts]]:
    """A row, and prompt, rationale, answer and teacher's rationale that must come of it."""
    return {"gsm8k": _gsm8k, "svamp": _svamp, "strategyqa": _strategyqa, "arc_easy": _arc, "own": _own}[corpus]()


@st.composite
def spelled(draw: st.DrawFn, row: dict) -> bytes:
    """A row as JSON in one of its spellings."""
    fields = dict(draw(st.permutations(list(row.items()))))
    text = json.dumps(fields, ensure_ascii=draw(st.booleans()), separators=draw(st.sampled_from([None, (",", ":")])))
    blanks = st.sampled_from(["", " ", "\t", "\r\n", "\n\n"])
    return f"{draw(blanks)}{text}{draw(blanks)}".encode()
