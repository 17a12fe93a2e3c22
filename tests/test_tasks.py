import gzip
import json

import pytest

from rsoups import DatasetError
from rsoups._resources import load_rows, resolve
from rsoups.tasks import TASKS, first_sentence, fit_prompts, format_prompt, question_of, read_jsonl


def test_prompts_are_the_papers():
    words = "Write one sentence that uses these words."
    assert format_prompt(words, "dog, frisbee, catch") == (
        "### Instruction: Write one sentence that uses these words. ### Input: dog, frisbee, catch ### Response: "
    )
    assert format_prompt("Why is\nthe sky blue?") == "### Instruction: Why is the sky blue? ### Response: "


@pytest.mark.parametrize(
    ("instruction", "input", "question"),
    [
        ("Summarise this post.", "A long post.", "A long post."),
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


def test_assistant_rows_keep_short_first_questions():
    row = {"chosen": "\n\nHuman: How do I boil an egg?\n\nAssistant: In water.\n\nHuman: Thanks\n\nAssistant: Sure"}
    long = {"chosen": f"\n\nHuman: {'why ' * 40}\n\nAssistant: Because."}
    rows = TASKS["assistant"].rows([row, long])
    assert rows == [{"prompt": "### Instruction: How do I boil an egg? ### Response: ", "references": ["In water."]}]


def test_missing_columns_and_empty_datasets_are_named():
    with pytest.raises(DatasetError, match=r"needs the column\(s\) \['concepts'\].*\['text'\]"):
        TASKS["concepts"].rows([{"text": "x"}])
    with pytest.raises(DatasetError, match="no row"):
        TASKS["concepts"].rows([])


def test_rows_from_files_and_folders(tmp_path):
    rows = [{"concepts": ["a", "b"], "sentences": ["A b."]}, {"concepts": ["c", "d"]}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    with gzip.open(tmp_path / "other.jsonl.gz", "wt") as out:
        out.write(json.dumps(rows[1]) + "\n")
    task = TASKS["concepts"]
    assert [row["references"] for row in load_rows(task, str(tmp_path), "train")] == [["A b."], []]
    assert len(load_rows(task, str(tmp_path), "train", limit=1)) == 1
    assert load_rows(task, str(tmp_path / "other.jsonl.gz"), "test")[0]["prompt"].count("c, d") == 1
    with pytest.raises(DatasetError, match="holds no test.jsonl"):
        load_rows(task, str(tmp_path), "test")
    (tmp_path / "bad.jsonl").write_text('{"concepts": [}\n')
    with pytest.raises(DatasetError, match="bad.jsonl, line 1"):
        read_jsonl(tmp_path / "bad.jsonl")


def test_embedded_names_are_known_or_refused():
    assert resolve("user/model") == "user/model"
    with pytest.raises(DatasetError, match="rsoups/concepts"):
        resolve("rsoups/nothing")


def test_the_demos_prompts_do_not_leak_between_train_and_test():
    train, test = (load_rows(TASKS["concepts"], None, split) for split in ("train", "test"))
    sets = [{frozenset(question_of(row["prompt"]).split(", ")) for row in rows} for rows in (train, test)]
    assert len(sets[0]) == len(train) == 4096 and len(sets[1]) == len(test) == 256
    assert not sets[0] & sets[1]
