"""Prompts: how they are built, read, cut and fitted into a context."""

import pytest

from rsoups import DatasetError
from rsoups.data.prompts import first_sentence, fit_prompts, format_prompt, pair_of, question_of
from rsoups.data.tasks import custom_task


def test_prompts_are_the_papers():
    words = "Write one sentence that uses these words."
    assert format_prompt(words, "dog, frisbee, catch") == (
        "### Instruction: Write one sentence that uses these words. ### Input: dog, frisbee, catch ### Response: "
    )
    assert format_prompt("Why is\nthe sky blue?") == "### Instruction: Why is the sky blue? ### Response: "


@pytest.mark.parametrize(
    ("instruction", "input", "question"),
    [
        ("Summarize this post.", "A long post.", "A long post."),
        ("Why is the sky blue?", None, "Why is the sky blue?"),  # no input: the paper's code lost this question
        ("Why?", "What does ### Response: mean?", "What does ### Response: mean?"),
    ],
)
def test_the_question_is_found_in_every_kind_of_prompt(instruction, input, question):
    assert question_of(format_prompt(instruction, input)) == question


def test_a_bare_question_is_its_own_question():
    assert question_of(" How are you? ") == "How are you?"


def test_responses_are_cut_at_the_first_sentence():
    assert first_sentence("A dog runs. A cat sleeps.") == "A dog runs."
    assert first_sentence("It costs 3.50 today! Really.") == "It costs 3.50 today!"
    assert first_sentence(" no end\nhere ") == "no end here"


def test_prompts_that_leave_no_room_are_refused_or_dropped():
    prompts, lengths = ["a", "b", "c"], [3, 9, 4]
    assert fit_prompts(prompts, lengths, 9, "refuse") == prompts
    with pytest.raises(
        DatasetError, match=r"1 of 3 prompts are longer than 4 tokens \(the longest: 9\).*--long_prompts drop"
    ):
        fit_prompts(prompts, lengths, 4, "refuse")
    assert fit_prompts(prompts, lengths, 4, "drop") == ["a", "c"]
    with pytest.raises(DatasetError, match="none of 3 prompts has at most 2 tokens"):
        fit_prompts(prompts, lengths, 2, "drop")


PARTS = [{"type": "text", "text": "dog, "}, {"type": "text", "text": "run"}]
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("messages", "question"),
    [
        ([SYSTEM, {"role": "user", "content": PARTS}], "dog, run"),
        ([{"role": "user", "content": ["dog", ", run"]}], "dog, run"),
        ([{"from": "system", "value": "s"}, {"from": "human", "value": "dog, run"}], "dog, run"),
        (
            [
                {"role": "user", "content": "A?"},
                {"role": "assistant", "content": "B"},
                {"role": "user", "content": "C?"},
            ],
            "C?",
        ),
        ([{"role": "human", "content": "dog"}], "{'role': 'human', 'content': 'dog'} has no known role"),
        ([{"from": "narrator", "value": "dog"}], "has no known role"),
        ([{"role": "user", "content": None}], "must be a text, or a list of text parts"),
        ([{"role": "user", "content": [{"type": "image"}]}], "must be a text, or a list of text parts"),
        ([{"role": "user", "content": {"text": "x"}}], "must be a text, or a list of text parts"),
        (["dog"], "a message is .*, not 'dog'"),
        (5, "not int: 5"),
        ({"role": "user", "content": "x"}, "not dict"),
        (
            [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"}],
            "ends with an assistant's message",
        ),
        ([{"role": "user", "content": "A", "tool_calls": [1]}], "calls tools"),
        ([SYSTEM], "asks nothing"),
        ([], "asks nothing"),
        ("  ", "asks nothing"),
        ("### Instruction:  ### Response: ", "asks nothing"),
    ],
    ids=str,
)
def test_messages_are_read_or_refused(messages, question):
    if question in ("dog, run", "C?"):
        assert question_of(messages) == question
        (row,) = custom_task("x").rows([{"prompt": messages}])
        assert question_of(row["prompt"]) == question
        assert all(
            isinstance(m["content"], str) and m["role"] in ("system", "user", "assistant") for m in row["prompt"]
        )
    else:
        with pytest.raises(DatasetError, match=question):
            question_of(messages)
        if not isinstance(messages, str) and messages:  # an empty prompt is left out, and counted
            with pytest.raises(DatasetError, match=f"row 1: .*{question}"):
                custom_task("x").rows([{"prompt": messages}])


def test_the_parts_of_a_paper_prompt_are_never_an_empty_question():
    assert question_of("### Instruction: Name it. ### Input:  ### Response: ") == "Name it."


def test_preference_pairs_of_texts_and_conversations():
    ask, good, bad = ({"role": r, "content": c} for r, c in (("user", "A?"), ("assistant", "B"), ("assistant", "C")))
    expected = ("A?", "B", "C")
    assert pair_of({"prompt": "A?", "chosen": "B", "rejected": "C"}) == expected
    assert pair_of({"prompt": [ask], "chosen": [good], "rejected": [bad]}) == expected
    assert pair_of({"prompt": "A?", "chosen": [good], "rejected": [bad]}) == expected
    assert pair_of({"chosen": [SYSTEM, ask, good], "rejected": [SYSTEM, ask, bad]}) == expected
    for row, words in (
        ({"chosen": "B", "rejected": "C"}, "has no prompt"),
        ({"prompt": "A?", "chosen": "B"}, r"\['rejected'\] of .* are empty"),
        ({"chosen": [ask, good], "rejected": [SYSTEM, bad]}, "not two answers to one conversation"),
        ({"prompt": [ask], "chosen": [good], "rejected": [ask]}, "not two answers"),
    ):
        with pytest.raises(DatasetError, match=words):
            pair_of(row)
