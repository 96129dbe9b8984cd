"""The readers of public corpora: values on small rows, and what is wrong with a row that does not fit."""

import pytest

from kvds.data.corpora import arc, gsm8k, plain, strategyqa, svamp
from kvds.data.rows import BadRow


def choices(labels: str, key: str | int) -> dict:
    listed = [{"label": label, "text": f"choice {i}"} for i, label in enumerate(labels, 1)]
    return {"question": {"stem": "Which?", "choices": listed}, "answerKey": key}


def hub_choices(labels: str, key: str) -> dict:
    texts = [f"choice {i}" for i in range(1, len(labels) + 1)]
    return {"question": "Which?", "choices": {"label": list(labels), "text": texts}, "answerKey": key}


def test_gsm8k_drops_annotations_and_commas():
    row = {"question": " How many? ", "answer": "He has 2*540=<<2*540=1080>>1080.\nSo $<<1080>>1,080.\n#### 1,080"}
    assert gsm8k(row) == ("How many?", "He has 2*540=1080.\nSo $1,080.", "1080")


@pytest.mark.parametrize(
    ("equation", "answer", "rationale", "plain_answer"),
    [
        ("( 76.0 - 25.0 )", 51.0, "76 - 25 = 51", "51"),
        ("( 6.0 - ( 3.0 + 2.0 ) )", 1, "6 - ( 3 + 2 ) = 1", "1"),
        ("( 1.0 + 2.0 ) * ( 3.0 + 4.0 )", "21.0", "( 1 + 2 ) * ( 3 + 4 ) = 21", "21"),
        ("( 3.05 / 2.0 )", 1.525, "3.05 / 2 = 1.525", "1.525"),
        ("( 5.0 * 20000000000.0 )", 100000000000.0, "5 * 20000000000 = 100000000000", "100000000000"),
        ("( 0.1 * 0.0001 )", 1e-05, "0.1 * 0.0001 = 0.00001", "0.00001"),
    ],
)
def test_svamp_equation_becomes_the_rationale(equation, answer, rationale, plain_answer):
    row = {"Body": "A has some.", "Question": "How many?", "Equation": equation, "Answer": answer}
    assert svamp(row) == ("A has some. How many?", rationale, plain_answer)


@pytest.mark.parametrize(
    ("body", "joined"), [("a pack", "a pack. How?"), ("A pack.", "A pack. How?"), ("If,", "If, How?")]
)
def test_svamp_joins_body_and_question(body, joined):
    assert svamp({"Body": body, "Question": "How?", "Equation": "( 1.0 )", "Answer": 1.0})[0] == joined


def test_strategyqa_facts_are_the_rationale():
    facts = ["Caesar had  three children.", "Khan had sixteen.\n", " "]
    row = {"question": "More?", "facts": facts, "answer": True}
    assert strategyqa(row) == ("More?", "Caesar had three children.\nKhan had sixteen.", "yes")
    assert strategyqa({**row, "facts": "One text, as on the hub.", "answer": False}) == (
        "More?", "One text, as on the hub.", "no",
    )  # fmt: skip


@pytest.mark.parametrize("form", [choices, hub_choices])
@pytest.mark.parametrize(
    ("labels", "key", "letter"),
    [("ABCD", "B", "B"), ("1234", "4", "D"), ("ABC", "A", "A"), ("ABCDE", "E", "E"), ("123", "3", "C")],
)
def test_arc_letters_its_choices(form, labels, key, letter):
    listed = "".join(f"\n{'ABCDE'[i]}. choice {i + 1}" for i in range(len(labels)))
    assert arc(form(labels, key)) == ("Which?" + listed, "", letter)


def test_arc_takes_a_numeric_key():
    assert arc(choices("1234", 2))[2] == "B"


def test_plain_rows():
    assert plain({"prompt": "p ", "rationale": " r\nr2", "answer": " a\r\n b  c\rd\n"}) == ("p", "r\nr2", "a\n b  c\nd")
    assert plain({"prompt": "p", "answer": 12345678901}) == ("p", "", "12345678901")
    assert plain({"prompt": "p", "rationale": None, "answer": 2.50}) == ("p", "", "2.5")
    assert plain({"prompt": "p", "rationale": "", "answer": "x", "id": 3}) == ("p", "", "x")


GSM8K, SVAMP = {"question": "q", "answer": "s #### 1"}, {"Body": "b", "Question": "q", "Equation": "( 1 )", "Answer": 1}
STRATEGY, PLAIN = {"question": "q", "facts": ["f"], "answer": True}, {"prompt": "p", "answer": "a"}


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (gsm8k, {"question": "q"}, "'answer' is missing; found ['question']"),
        (gsm8k, {**GSM8K, "answer": "no mark 5"}, "'answer' has no '#### NUMBER' at its end"),
        (gsm8k, {**GSM8K, "answer": "steps ####  "}, "'answer' has no '#### NUMBER' at its end"),
        (gsm8k, {**GSM8K, "answer": "steps #### many"}, "'answer' is ' many'; expected a number"),
        (gsm8k, {**GSM8K, "answer": 7}, "'answer' is 7; expected a text"),
        (gsm8k, {**GSM8K, "question": " "}, "'question' is ' '; expected a text"),
        (gsm8k, {**GSM8K, "question": "\u200b\ufeff"}, r"'question' is '\u200b\ufeff'; expected a text"),
        (svamp, {**SVAMP, "Answer": True}, "'Answer' is True; expected a number"),
        (svamp, {**SVAMP, "Answer": float("nan")}, "'Answer' is nan; expected a number"),
        (svamp, {**SVAMP, "Answer": float("-inf")}, "'Answer' is -inf; expected a number"),
        (svamp, {**SVAMP, "Answer": None}, "'Answer' is None; expected a number"),
        (svamp, {**SVAMP, "Equation": []}, "'Equation' is []; expected a text"),
        (strategyqa, {**STRATEGY, "answer": "yes"}, "'answer' is 'yes'; expected true or false"),
        (strategyqa, {**STRATEGY, "facts": ["a", 1]}, "'facts' is ['a', 1]; expected a list of texts"),
        (strategyqa, {"question": "q", "answer": True}, "'facts' is None; expected a list of texts"),
        (arc, choices("AB", "A"), "2 choices; expected 3 to 5"),
        (arc, choices("ABCDEF", "A"), "6 choices; expected 3 to 5"),
        (arc, choices("ABCA", "A"), "labels ['A', 'B', 'C', 'A']; expected A-E or 1-5 in order"),
        (arc, choices("1BCD", "1"), "labels ['1', 'B', 'C', 'D']; expected A-E or 1-5 in order"),
        (arc, choices("ABCD", "E"), "'answerKey' is 'E'; expected one of ['A', 'B', 'C', 'D']"),
        (arc, choices("ABCD", "AB"), "'answerKey' is 'AB'; expected one of ['A', 'B', 'C', 'D']"),
        (arc, choices("ABCD", ""), "'answerKey' is ''; expected one of ['A', 'B', 'C', 'D']"),
        (arc, choices("1234", True), "'answerKey' is True; expected one of ['1', '2', '3', '4']"),
        (arc, {**choices("ABCD", "A"), "question": {"stem": "s", "choices": "A"}}, "'choices' is 'A'; expected a list"),
        (
            arc,
            {"question": "q", "choices": {"label": ["A", "B", "C"], "text": ["a", "b"]}},
            "expected equally long lists",
        ),
        (
            arc,
            {"question": "q", "choices": {"label": ["A"] * 3, "text": ["a", 2, "c"]}},
            "'text' is 2; expected a text",
        ),
        (plain, {**PLAIN, "prompt": ["x"]}, "'prompt' is ['x']; expected a text"),
        (plain, {**PLAIN, "rationale": 3}, "'rationale' is 3; expected a text"),
        (plain, {**PLAIN, "answer": None}, "'answer' is None; expected a text"),
        (plain, {**PLAIN, "answer": False}, "'answer' is False; expected a text"),
        (plain, {**PLAIN, "answer": " \n"}, "expected a text"),
    ],
)
def test_a_malformed_row_is_told_by_field_and_value(read, row, message):
    with pytest.raises(BadRow) as caught:
        read(row)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
