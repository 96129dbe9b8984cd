"""How a row is written and how its answer is read back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvds.data.example import (
    Example,
    answer_text,
    completion_text,
    extract_answer,
    normalise_answer,
    plain_number,
    prompt_text,
)


def test_the_template():
    row = Example("How many?", "1 + 1 = 2", "2", "c", "f:1")
    assert prompt_text(row) + completion_text(row) == "How many?\n1 + 1 = 2\n#### 2"
    assert completion_text(Example("q", "", "B", "c", "f:1")) == "#### B"


NUMBERS = {
    "72": "72", "1,080": "1080", "109,200,000": "109200000", "$18": "18", "-$5": "-5", "$ 5": "5", "18.": "18",
    "$1,080.00.": "1080", "0.50": "0.5", ".5": "0.5", "51.0": "51", "100": "100", "25%": "25", "-3": "-3", "+7": "7",
    "\N{MINUS SIGN}3": "-3", "-0.0": "0", "123456789012345678901": "123456789012345678901", "38": "38", "0": "0",
}  # fmt: skip
TEXTS = {
    "Yes.": "yes", " NO ": "no", "B": "b", "a  b": "a b", "1,08": "1,08", "1.2.3": "1.2.3", "e5": "e5", "4 8": "4 8",
    "04": "04", "00": "00", "-007": "-007", "": "", "...": "...", ".": ".", "1%00": "1%00", "$": "$", "%5": "%5",
    "$-5": "-5", "\ufeff 5\u200b": "5", "\u200bYes. \u2060": "yes", "\u200b \ufeff": "",
    "\N{ARABIC-INDIC DIGIT FIVE}": "\N{ARABIC-INDIC DIGIT FIVE}",
}  # fmt: skip


@pytest.mark.parametrize(("written", "expected"), [*NUMBERS.items(), *TEXTS.items()])
def test_answers_are_compared_in_one_form(written, expected):
    assert normalise_answer(written) == expected
    assert normalise_answer(expected) == expected


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("steps\n#### 72", "72"),
        ("steps\n####72\nand then I rambled #### 5", "72"),
        ("####\n 1,080 \nmore", "1080"),
        ("no mark 72", ""),
        ("steps ####", ""),
        ("steps #### \n \n", ""),
        ("", ""),
    ],
)
def test_the_answer_is_the_line_behind_the_first_mark(completion, answer):
    assert extract_answer(completion) == answer


CODE = "def f(x):\n    if x:\n        return  X\n\n    return 0"


def test_an_answer_of_several_lines_is_compared_line_by_line():
    row = Example("p", "", CODE, "c", "f:1")
    assert answer_text(row) == f"#### {CODE}"
    assert extract_answer(answer_text(row), whole=True) == normalise_answer(CODE) == CODE
    assert extract_answer(f"####\n{CODE}".replace("\n", " \r\n"), whole=True) == CODE  # blanks at line ends alone
    for other in (CODE.replace("    if", "  if"), CODE.replace("X", "x"), CODE.replace("\n\n", "\n"), CODE + "\nf"):
        assert extract_answer(f"#### {other}", whole=True) != CODE


@given(st.text(min_size=1).filter(str.strip))
def test_no_answer_is_not_equal_to_an_answer(answer):
    """What is more than blanks never normalises to what a completion without any answer gives."""
    assert normalise_answer(answer) and extract_answer(f"#### {answer}") and not extract_answer(answer.replace("#", ""))


@given(st.integers(0, 10**6), st.text("$%, .", max_size=3), st.integers(0, 10**6))
def test_signs_inside_a_number_are_no_ornament(left, between, right):
    """Two groups of digits are the number that they make together only by a thousands comma or a decimal point."""
    found = plain_number(normalise_answer(f"{left}{between}{right:03}"))
    if any(sign in between for sign in "$% "):
        assert found is None


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**20), max_value=10**20))
def test_numbers_keep_their_exact_value(number):
    written = f"{number:,f}"
    assert plain_number(plain_number(written)) == plain_number(written)
    assert type(number)(plain_number(written)) == number


@given(st.text(), st.text())
def test_any_text_has_an_answer(rationale, answer):
    row = Example("p", rationale.replace("####", ""), answer, "c", "f:1")
    extracted = extract_answer(answer_text(row))
    assert extracted == normalise_answer(extracted)
    assert isinstance(extract_answer(completion_text(row)), str)
