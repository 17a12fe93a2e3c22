"""Tasks: the paper's, and one's own."""

import pytest

from rsoups import DatasetError
from rsoups.common.assets import resolve
from rsoups.data.datasets import load_rows
from rsoups.data.prompts import question_of, response_start
from rsoups.data.tasks import TASKS, columns_of, custom_task, find_task


def test_rows_keep_the_columns_that_rewards_read():
    task = custom_task("x")
    rows = task.rows([{"prompt": "a", "answer": 1, "other": 2}, {"prompt": "b", "response": "r"}], kept=["answer"])
    assert rows == [{"prompt": "a", "answer": 1, "references": []}, {"prompt": "b", "references": ["r"]}]
    rows = task.rows([{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 0}], kept=["answer", "nothing"])
    assert columns_of(rows) == {"prompt": ["a", "b"], "answer": [1, 0]}  # no row has references
    rows = [{"prompt": "a", "references": ["r"]}, {"prompt": "b", "references": []}]
    assert columns_of(rows) == {"prompt": ["a", "b"], "references": [["r"], []]}
    assert columns_of([]) == {}
    ragged = [{"prompt": "a", "references": ["r"]}, {"prompt": "b", "references": [], "n": 0}]
    assert columns_of(ragged)["n"] == [None, 0]


def test_assistant_rows_keep_short_first_questions():
    row = {"chosen": "\n\nHuman: How do I boil an egg?\n\nAssistant: In water.\n\nHuman: Thanks\n\nAssistant: Sure"}
    long = {"chosen": f"\n\nHuman: {'why ' * 40}\n\nAssistant: Because."}
    rows = TASKS["assistant"].rows([row, long])
    assert rows == [{"prompt": "### Instruction: How do I boil an egg? ### Response: ", "references": ["In water."]}]


SUMMARIZE = "### Instruction: Generate a one-sentence summary of this post. ### Input: "
ARTICLE = "A bank " + "in town " * 20 + "closed."
ROWS = {
    "news": (
        [
            {"text": f"LONDON (Reuters) - {ARTICLE}\nMore.", "prediction": [{"text": "Bank\ncloses."}], "id": "a"},
            {"text": f"LONDON (Reuters) - {ARTICLE}", "prediction": [{"text": "Again."}], "id": "a"},  # one per id
            {"text": "too short", "prediction": [{"text": "x"}], "id": "b"},
            {"text": "w" * 1500, "prediction": [{"text": "x"}], "id": "c"},
            {"text": None, "prediction": None, "id": "d"},
            {"text": f"No agency. {ARTICLE}", "prediction": None, "id": "e"},
        ],
        [
            (f"{SUMMARIZE}{ARTICLE} More. ### Response: ", ["Bank closes."]),
            (f"{SUMMARIZE}No agency. {ARTICLE} ### Response: ", []),
        ],
    ),
    "reddit": (
        [
            {"info": {"id": "t3_1", "post": f"{ARTICLE}\nHelp!"}, "summaries": [{"text": "a"}, {"text": " B."}], "choice": 1},
            {"info": {"id": "t3_1", "post": ARTICLE}, "summaries": [{"text": "bad"}, {"text": "x"}], "choice": 0},
            {"info": {"id": "t3_2", "post": None, "article": "news"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0},
            {"info": {"id": "t3_3", "post": "w" * 1200}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0},
        ],
        [(f"{SUMMARIZE}{ARTICLE} Help! ### Response: ", ["B."])],
    ),
    "stack": (
        [
            {"qid": 1, "question": "Why does\n`é` break?", "response_j": "It does.", "response_k": "It\ndoes not."},
            {"qid": 1, "question": "Why does `é` break?", "response_j": "It does.", "response_k": "Again."},
            {"qid": 2, "question": "w" * 300, "response_j": "x", "response_k": "y"},
            {"qid": 3, "question": None, "response_j": "x", "response_k": "y"},
        ],
        [("### Instruction: Why does `é` break? ### Response: ", ["It does not."])],
    ),
    "review": (
        [{"text": "Great film. " * 20, "label": 1}, {"text": "Short.", "label": 0}, {"text": None, "label": 0}],
        [("### Instruction: Generate a movie review. ### Response: ", [("Great film. " * 20).strip()])],
    ),
    "assistant": (
        [{"chosen": "\n\nHuman: What is it?\n\nAssistant: A dog.", "rejected": "x"}, {"chosen": None}],
        [("### Instruction: What is it? ### Response: ", ["A dog."])],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_prompts_of_the_papers_tasks(name):
    rows, expected = ROWS[name]
    assert [(row["prompt"], row["references"]) for row in TASKS[name].rows(rows)] == expected
    assert TASKS[name].rows(rows, most=1) == TASKS[name].rows(rows)[:1]


def test_a_task_of_ones_own(tmp_path):
    rows = [
        {"prompt": "Why?", "reference": "So."},
        {"prompt": "", "reference": "x"},
        {"prompt": None, "reference": None},
    ]
    assert custom_task("x").rows(rows) == [{"prompt": "Why?", "references": ["So."]}]
    templated = custom_task("x", "Put {text} in {words} words {words}.")
    assert templated.columns == ("text", "words")
    found = templated.rows([{"text": "{words}", "words": 3, "references": ["a", "", "b"]}, {"text": None, "words": 3}])
    assert found == [{"prompt": "Put {words} in 3 words 3.", "references": ["a", "b"]}]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hello? "}]
    assert custom_task("x").rows([{"prompt": messages}])[0]["prompt"] == messages
    assert question_of(messages) == "Hello?" and response_start(messages) == ""
    with pytest.raises(DatasetError, match=r"needs the column\(s\) \['article'\]"):
        custom_task("x", "Summarize: {article}").rows(rows)
    with pytest.raises(DatasetError, match="names no column"):
        custom_task("x", "Summarize")


def test_datasets_of_the_hub_are_asked_for_the_papers_splits(monkeypatch):
    asked = []

    def load_dataset(path, *, split, streaming, data_dir, revision):
        asked.append((path, data_dir, revision, split, streaming))
        return iter(ROWS[task][0])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for task, split in (
        ("news", "train"),
        ("news", "test"),
        ("reddit", "test"),
        ("stack", "train"),
        ("stack", "test"),
        ("review", "test"),
    ):
        load_rows(TASKS[task], None, split)
    assert asked == [
        ("argilla/news-summary", None, None, "test", False),
        ("argilla/news-summary", None, None, "train", False),
        ("openai/summarize_from_feedback", "comparisons", "refs/convert/parquet", "validation", False),
        ("lvwerra/stack-exchange-paired", "data/rl", None, "train", True),
        ("lvwerra/stack-exchange-paired", "data/evaluation", None, "train", True),
        ("stanfordnlp/imdb", None, None, "test", False),
    ]


def test_missing_columns_and_empty_datasets_are_named():
    with pytest.raises(DatasetError, match=r"needs the column\(s\) \['concepts'\].*\['text'\]"):
        TASKS["concepts"].rows([{"text": "x"}])
    with pytest.raises(DatasetError, match="no row"):
        TASKS["concepts"].rows([])


def test_numbers_in_a_template_are_texts_and_0_is_one():
    task = custom_task("x", "Count to {n}.")
    rows = [{"n": 0}, {"n": 2.5}, {"n": None}, {"n": " "}]
    assert [row["prompt"] for row in task.rows(rows)] == ["Count to 0.", "Count to 2.5."]
    with pytest.raises(DatasetError, match=r"row 1: the template's columns are texts or numbers, 'n' is \[1\]"):
        task.rows([{"n": [1]}])


def test_references_are_texts_or_messages():
    task = custom_task("x")

    def references(**columns):
        return task.rows([{"prompt": "p"} | columns])[0]["references"]

    assert references(references=["a", None, ""]) == ["a"] and references(response="b") == ["b"]
    assert references(reference=[{"role": "assistant", "content": "c"}]) == ["c"]
    assert references(reference=42, response={"x": 1}) == []  # columns for rewards
    with pytest.raises(DatasetError, match="references are texts"):
        references(references=[1, 2])


def test_embedded_names_are_known_or_refused():
    assert resolve("user/model") == "user/model"
    with pytest.raises(DatasetError, match="rsoups/concepts"):
        resolve("rsoups/nothing")


def test_a_task_is_found_by_its_name():
    assert find_task("concepts") is TASKS["concepts"] and find_task("custom", "x").name == "custom"
    for name in ("custom", "concept"):
        with pytest.raises(DatasetError, match=f"custom needs a --dataset; got '{name}'"):
            find_task(name)
