"""Conversations as data sets write them, and what is wrong with those that cannot be learned from."""

import json

import pytest

from kvds.data.conversation import conversation
from kvds.data.example import Message, split_trace
from kvds.data.rows import BadRow
from tests.harness.chat_tokenizers import turns

ASKED = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}


def test_both_ways_of_writing_turns_are_the_same():
    expected = (Message("system", "s"), Message("user", "q"), Message("assistant", "a"))
    sharegpt = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert conversation(turns("system: s", "user: q", "assistant: a"), "messages") == expected
    assert conversation(sharegpt, "conversations") == expected
    assert conversation(json.dumps(sharegpt), "conversations") == expected
    assert conversation([ASKED, SAID], "messages", system="s") == expected
    parts = [{"role": "user", "content": [{"type": "text", "text": "q"}]}, SAID]
    assert conversation([{"role": "developer", "content": "s"}, *parts], "messages") == expected


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_told_from_the_answer(field):
    expected = (Message("user", "q"), Message("assistant", "a", "r"))
    assert conversation([ASKED, {**SAID, field: " r\n"}], "m") == expected
    assert conversation([ASKED, {**SAID, "content": "<think>\nr\n</think>\n\na"}], "m") == expected
    assert conversation([ASKED, {**SAID, field: None}], "m") == (Message("user", "q"), Message("assistant", "a"))


def test_turns_behind_the_last_of_the_assistant_and_of_weight_0_are_not_learned():
    found = conversation([ASKED, {**SAID, "weight": 0}, ASKED, SAID, ASKED], "m")
    assert [(turn.role, turn.counted) for turn in found] == [
        ("user", True), ("assistant", False), ("user", True), ("assistant", True),
    ]  # fmt: skip


def test_a_trace_is_split_off_with_and_without_its_beginning():
    assert split_trace("<think>\nr\n</think>\n\na") == ("r", "a")
    assert split_trace("r\n</think>\na") == ("r", "a")  # the prompt has begun it
    assert split_trace("a <think> b </think> c") == ("", "a <think> b </think> c")
    assert split_trace("a") == ("", "a")


TOOL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "'m' is []; expected a list of turns such as {'role': 'user', 'content': TEXT}"),
        (None, "'m' is None; expected a list of turns"),
        ("not json", "'m' is 'not json'; expected a list of turns"),
        (["hi"], "'m' turn 1 is 'hi'; expected {'role'"),
        ([ASKED], "'m' has no turn of an assistant to learn from; expected one behind a user's"),
        ([ASKED, {**SAID, "weight": 0}], "'m' has no turn of an assistant to learn from"),
        ([SAID, ASKED, SAID], "'m' begins with the assistant; expected a turn of a user before it"),
        (turns("system: a", "system: b", "user: q", "assistant: a"), "'m' turn 2 is a second system turn"),
        (turns("user: q", "system: b", "assistant: a"), "'m' turn 2 is a system turn behind others; expected one at"),
        ([ASKED, {**SAID, "role": "narrator"}], "'m' turn 2 has the role 'narrator'; expected one of system,"),
        ([ASKED, {"content": "a"}], "'m' turn 2 has the role None; expected one of system,"),
        ([ASKED, {**SAID, "content": None}], "'m' turn 2 (assistant) has the content null; expected a text"),
        ([{**ASKED, "content": " "}, SAID], "'m' turn 1 (user) has the content ' '; expected a text"),
        ([ASKED, {**SAID, "content": 3}], "'m' turn 2 (assistant) has the content 3; expected a text"),
        ([ASKED, TOOL, SAID], "'m' turn 2 calls or is a tool ('assistant'); expected turns of system, user and"),
        ([ASKED, {"role": "tool", "content": "x"}, SAID], "'m' turn 2 calls or is a tool ('tool')"),
        ([{**ASKED, "content": [{"type": "image"}]}, SAID], "turn 1 (user) has parts of the kind image"),
        ([ASKED, {**SAID, "reasoning": 3}], "'m' turn 2 has the reasoning 3; expected a text"),
        ([ASKED, {**SAID, "content": "<think>r</think>"}], "turn 2 (assistant) says nothing behind </think>"),
        ([ASKED, {**SAID, "content": "<think>r</think>\u200b"}], "turn 2 (assistant) says nothing behind </think>"),
        ([ASKED, {**SAID, "content": "<think>r"}], "'m' turn 2 (assistant) begins with <think>, which never ends"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_turn(messages, message):
    with pytest.raises(BadRow) as caught:
        conversation(messages, "m")
    assert message in str(caught.value)


def test_a_trace_that_nobody_sees_is_none():
    assert conversation([ASKED, {**SAID, "reasoning": "\u200b\n\ufeff"}], "m")[-1].reasoning == ""
