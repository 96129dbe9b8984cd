"""Formats are recognised by columns or said, and a row that is of none is told what it has and what would help."""

import json

import pytest

from kvds.data.example import Example, Message
from kvds.data.mixture import load_mixture
from kvds.data.row_formats import recognise
from kvds.errors import InputError
from tests.harness.chat_tokenizers import turns

CHAT = turns("user: q", "assistant: a")


@pytest.mark.parametrize(
    ("row", "form", "why"),
    [
        ({"prompt": "p", "answer": "a"}, "reasoning", "reasoning (by its columns: prompt, answer)"),
        ({"prompt": "p", "rationale": "r", "answer": "a", "completion": "c"}, "reasoning", "prompt, answer, rationale"),
        ({"prompt": "p", "completion": "c"}, "completion", "completion (by its columns: prompt, completion)"),
        ({"prompt": "p", "response": "c", "id": 3}, "completion", "prompt, response as completion"),
        ({"prompt": "p", "prompt_id": 3, "messages": CHAT}, "messages", "messages (by its columns: messages)"),
        ({"conversations": CHAT, "system": "s"}, "messages", "conversations as messages, system"),
        ({"text": "t", "label": 1}, "text", "text (by its columns: text)"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "messages", "messages (by its columns: prompt, completion)"),
        ({"prompt": CHAT[:1], "answer": "a"}, "messages", "messages (by its columns: prompt, answer)"),
    ],
)
def test_a_format_is_recognised_by_columns(row, form, why):
    reader = recognise(row, "f:1")
    assert reader.form == form and why in reader.why


def read(row: dict, **how: str) -> Example:
    found = recognise(row, "f:1", **how)(row)
    return Example(*found[:3], "", "", *found[3:]) if isinstance(found, tuple) else found


def test_what_each_format_reads():
    assert read({"prompt": " p ", "answer": 5}) == Example("p", "", "5", "", "")
    completion = read({"prompt": "p: ", "completion": " c\n"})
    assert (completion.prompt, completion.answer, completion.form) == ("p: ", " c\n", "completion")  # as they stand
    assert read({"text": " t "}).answer == " t "
    chat = read({"conversations": turns("user: q", "assistant: a", "user: q2", "assistant: a2"), "system": "s"})
    assert (chat.prompt, chat.rationale, chat.answer) == ("q\nq2", "", "a2")
    assert chat.messages[0] == Message("system", "s")
    lists = read({"prompt": turns("user: q", "assistant: a", "user: r"), "completion": turns("assistant: b")})
    assert [turn.counted for turn in lists.messages if turn.role == "assistant"] == [False, True]
    assert read({"prompt": CHAT[:1], "completion": "a"}).messages[-1] == Message("assistant", "a")


def test_columns_are_said_and_may_be_joined():
    row = {"question": "q", "steps": "r", "answer": "a", "input": "i", "none": None}
    assert read(row, columns="prompt=question,rationale=steps,answer=answer") == Example("q", "r", "a", "", "")
    assert read(row, columns="prompt=answer,answer=question") == Example("a", "", "q", "", "")
    assert read(row, columns="prompt=question+input+none,completion=answer").prompt == "q\n\ni"
    assert read({"a+b": "t"}, columns="text=a+b").answer == "t"


def test_a_prompt_with_its_answer_may_be_said_to_be_a_chat():
    chat = read({"prompt": "p", "rationale": "r", "answer": 5, "system": "s"}, form="messages")
    assert chat.messages == (Message("system", "s"), Message("user", "p"), Message("assistant", "5", "r"))
    row = {"instruction": "i", "output": "o"}
    chat = read(row, form="messages", columns="prompt=instruction,completion=output")
    assert chat.messages == (Message("user", "i"), Message("assistant", "o"))


@pytest.mark.parametrize(
    ("row", "how", "message"),
    [
        ({"question": "q", "answer": "a"}, {}, "f:1: its columns (answer, question) are those of no format (reasoning: "
         "prompt and answer; messages: messages; completion: prompt and completion; text: text); expected to be told "
         "which is which (--columns prompt=question,answer=answer)"),
        ({"instruction": "i", "output": "o"}, {}, "(--columns prompt=instruction,completion=output)"),
        ({"dialog": []}, {}, "(--columns messages=dialog)"),
        ({"Prompt": "p", "Chosen": "c"}, {}, "(--columns prompt=Prompt,completion=Chosen)"),
        ({"content": "t"}, {}, "(--columns text=content)"),
        ({"x": 1}, {}, "(--columns prompt=COLUMN,answer=COLUMN)"),
        ({}, {}, "its columns (no column at all) are those of no format"),
        ({"text": "t"}, {"form": "completion"}, "of no format (completion: prompt and completion); expected"),
        ({"question": "q", "answr": "a"}, {"columns": "prompt=question,answer=answer"},
         "f:1 has no column answer, did you mean answr?; expected one of answr, question (--columns"),
        ({"a": "t"}, {"columns": "text=a+b"}, "f:1 has no column b"),
    ],
)  # fmt: skip
def test_a_row_of_no_format_is_told_its_columns_and_the_remedy(row, how, message):
    with pytest.raises(InputError) as caught:
        recognise(row, "f:1", **how)
    assert message in str(caught.value)


def rows_file(folder, *rows: object) -> str:
    (folder / "own.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "own.eval.jsonl").write_text(json.dumps(rows[0]))
    return str(folder / "own.jsonl")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": CHAT}, {"messages": []}], "own.jsonl:2: 'messages' is []; expected a list of turns"),
        ([{"messages": CHAT}, {"text": "t"}], "own.jsonl:2: 'messages' is missing; found ['text']"),
        (
            [{"text": "t"}, {"text": None}],
            "own.jsonl:2: 'text' is null; expected a text (mend the row",
        ),
        (
            [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": " "}],
            "2: 'completion' is ' '",
        ),
        ([{"text": "a"}, {"text": "<|im_start|>user"}], "2: holds '<|im_start|>', as if rendered with a chat template"),
        ([{"text": "a"}, {"text": "\ud800"}], "2: holds half of a surrogate pair"),
        (
            [{"messages": CHAT}, {"messages": turns("user: \ud800", "assistant: a")}],
            "2: holds half of a surrogate pair",
        ),
    ],
)
def test_a_later_row_that_does_not_fit_is_named_or_skipped(tmp_path, rows, message):
    path = rows_file(tmp_path, *rows)
    with pytest.raises(InputError) as caught:
        load_mixture([path], "train")
    assert message in str(caught.value)
    mixture = load_mixture([path], "train", on_bad_row="skip")
    assert len(mixture.examples) == 1 and mixture.skipped == {path: 1}


def test_the_mark_of_an_answer_is_one_in_rows_of_reasoning_alone(tmp_path):
    for row in (
        {"text": "a #### b"},
        {"prompt": "p", "completion": "#### 3"},
        {"messages": turns("user: q", "assistant: ####")},
    ):
        assert len(load_mixture([rows_file(tmp_path, row, row)], "train").examples) == 2
    with pytest.raises(InputError, match="the answer holds '####'"):
        load_mixture([rows_file(tmp_path, {"prompt": "p", "answer": "#### 3"})], "train")


def test_rows_before_the_first_of_a_known_format_may_be_skipped(tmp_path):
    path = rows_file(tmp_path, {"text": "t"}, 3, {"x": 1}, {"text": "t"})
    (tmp_path / "own.jsonl").write_text('3\n{"x": 1}\n{"text": "t"}\n')
    assert [row.answer for row in load_mixture([path], "train", on_bad_row="skip").examples] == ["t"]
