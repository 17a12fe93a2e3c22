"""Datasets of whole conversations: the last answer is the reference, what comes before is the prompt."""

import pytest
from tiny import tiny_tokenizer

from recipes.sft import tokenized
from rsoups import DatasetError
from rsoups.data.tasks import custom_task

ASKED = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]
ANSWER = {"role": "assistant", "content": "w3 w4"}
AGAIN = {"role": "user", "content": "w5"}
TURNS = "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<s> {% endif %}"


def test_the_last_answer_is_the_reference():
    rows = custom_task("x").rows(
        [
            {"messages": [*ASKED, ANSWER]},
            {"messages": [*ASKED, ANSWER, AGAIN]},
            {"messages": [*ASKED, ANSWER], "reference": "mine"},
            {"conversations": 1, "messages": [{"from": "human", "value": "w2"}, {"from": "gpt", "value": "w6"}]},
            {"messages": []},
            {"messages": [ANSWER]},
            {"prompt": "w7", "messages": [*ASKED, ANSWER]},
        ]
    )
    assert [(row["prompt"], row["references"]) for row in rows] == [
        (ASKED, ["w3 w4"]),
        ([*ASKED, ANSWER, AGAIN], []),
        (ASKED, ["mine"]),
        ([{"role": "user", "content": "w2"}], ["w6"]),
        ("w7", []),
    ]


def test_a_prompt_that_ends_with_an_answer_is_refused():
    with pytest.raises(DatasetError, match=r"row 1: .*nothing to answer"):
        custom_task("x").rows([{"prompt": [*ASKED, ANSWER]}])


def test_supervised_rows_are_read_as_they_are_generated():
    tokenizer = tiny_tokenizer([f"w{i}" for i in range(10)])
    tokenizer.chat_template = TEMPLATE
    rows = custom_task("x").rows([{"messages": [*ASKED, ANSWER]}, {"prompt": "w7", "response": "w8"}])
    found = tokenized(rows, tokenizer)

    asked = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
    before = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert found[0]["input_ids"] == [*before, *tokenizer("w3 w4")["input_ids"], tokenizer.eos_token_id]
    assert found[0]["completion_mask"] == [0] * len(before) + [1, 1, 1]
    assert found[1]["input_ids"] == [*tokenizer("w7 w8")["input_ids"], tokenizer.eos_token_id]


def test_supervised_training_needs_a_response():
    with pytest.raises(DatasetError, match="no row has a response to learn from"):
        tokenized(custom_task("x").rows([{"prompt": "w7"}]), tiny_tokenizer(["w7"]))
