import gzip
import json
import os
import subprocess
import sys

import pytest
from datasets import Dataset

from rsoups import DatasetError
from rsoups.common.assets import resolve
from rsoups.common.files import read_jsonl
from rsoups.data.datasets import load_rows, train_and_held_out
from rsoups.data.prompts import first_sentence, fit_prompts, format_prompt, pair_of, question_of, response_start
from rsoups.data.tasks import TASKS, columns_of, custom_task, find_task


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


def test_tables_are_datasets(tmp_path):
    table = Dataset.from_dict({"prompt": ["Why, and how?", "What é?"], "response": ["So.", "That."]})
    table.to_csv(tmp_path / "train.csv")
    table.to_parquet(tmp_path / "test.parquet")
    expected = [{"prompt": "Why, and how?", "references": ["So."]}, {"prompt": "What é?", "references": ["That."]}]
    for split in ("train", "test"):
        assert load_rows(custom_task(str(tmp_path)), None, split) == expected
    assert load_rows(custom_task(str(tmp_path / "test.parquet")), None, "train", 1) == expected[:1]
    with pytest.raises(DatasetError, match="no dataset file"):
        load_rows(custom_task(str(tmp_path / "none.csv")), None, "train")


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


def test_a_dataset_that_is_a_script_is_refused(monkeypatch):
    def load_dataset(path, *arguments, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found mine.py")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DatasetError, match="'some/data' is a script, .* branch refs/convert/parquet"):
        load_rows(custom_task("some/data"), None, "train")


def test_every_process_makes_the_same_prompts(tmp_path):
    """Each rank reads the dataset for itself; Python's hashes differ between processes."""
    rows = [{"chosen": f"Human: Why is it so, {i % 9}?\n\nAssistant: because of {i} things in it."} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = f"""
from rsoups.data.datasets import load_rows
from rsoups.data.tasks import TASKS
from rsoups.data.prompts import with_prefixes
rows = load_rows(TASKS["assistant"], {str(tmp_path / "rows.jsonl")!r}, "train")
print(rows, with_prefixes(rows, str.split, " ".join, 2, 4, seed=3))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and outputs.pop().count(b"because of 39 things") == 1


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


def test_what_is_held_out_is_not_trained_on(tmp_path):
    rows = [{"prompt": f"Why {i}?"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one = custom_task(str(tmp_path / "rows.jsonl"))
    for asked, held_out in ((64, 4), (3, 3), (0, 0)):  # however many are looked at, the last tenth is not trained on
        train, rest = ([row["prompt"] for row in part] for part in train_and_held_out(one, None, asked))
        assert train == [f"Why {i}?" for i in range(36)] and rest == [f"Why {i}?" for i in range(36, 40)][:held_out]
    (tmp_path / "train.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "Other?"}))
    train, rest = train_and_held_out(custom_task(str(tmp_path)), None, 64)
    assert len(train) == 40 and [row["prompt"] for row in rest] == ["Other?"]


def test_one_split_of_a_file_by_its_different_prompts(tmp_path):
    """Rows of one prompt are on one side, wherever they are; every recipe reads the same split."""
    texts = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "a", "j", "k"]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text, "number": i}) for i, text in enumerate(texts)))
    task = custom_task(str(path))

    def prompts(split, **more):
        return [row["prompt"] for row in load_rows(task, None, split, **more)]

    assert prompts("test") == ["k"] and prompts("train") == texts[:-1] and prompts("all") == texts
    assert prompts("train", limit=2) == ["a", "b"]
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in texts[:-1]))
    assert prompts("test") == ["j", "j"] and not {"j"} & set(prompts("train"))
    path.write_text("\n".join(json.dumps({"prompt": f"{i}"}) for i in range(12_000)))
    assert len(prompts("test")) == 1_000
    path.write_text(json.dumps({"prompt": "one"}))
    with pytest.raises(DatasetError, match="holds only one prompt"):
        prompts("train")
    with pytest.raises(DatasetError, match="split all is for one file"):
        load_rows(TASKS["concepts"], None, "all")


def test_every_field_of_a_csv_is_a_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffprompt,id,answer\n"Why, ""so""?",007,NA\n12,null,1.0\n"two\nlines",None,\n', "utf-8")
    rows = load_rows(custom_task(str(path)), None, "all", kept=["id", "answer"])
    assert [(row["prompt"], row["id"], row["answer"]) for row in rows] == [
        ('Why, "so"?', "007", "NA"),
        ("12", "null", "1.0"),
        ("two\nlines", "None", ""),
    ]
    path.write_text('concepts\n"dog, run"\n')
    assert ": dog, run ###" in load_rows(TASKS["concepts"], str(path), "test")[0]["prompt"]
    for text, words in (
        ("prompt,x\na,b,c\n", "line 2: 3 fields, the header has 2"),
        ("prompt,prompt\na,b\n", "must name each column once"),
        ("", "must name each column once"),
    ):
        path.write_text(text)
        with pytest.raises(DatasetError, match=words):
            load_rows(custom_task(str(path)), None, "all")
    path.write_bytes(b"prompt\n\xff\n")
    with pytest.raises(DatasetError, match="is not CSV in UTF-8"):
        load_rows(custom_task(str(path)), None, "all")


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


def test_embedded_names_are_known_or_refused():
    assert resolve("user/model") == "user/model"
    with pytest.raises(DatasetError, match="rsoups/concepts"):
        resolve("rsoups/nothing")


def test_the_demos_prompts_do_not_leak_between_train_and_test():
    train, test = (load_rows(TASKS["concepts"], None, split) for split in ("train", "test"))
    sets = [{frozenset(question_of(row["prompt"]).split(", ")) for row in rows} for rows in (train, test)]
    assert len(sets[0]) == len(train) == 4096 and len(sets[1]) == len(test) == 256
    assert not sets[0] & sets[1]


def test_a_task_is_found_by_its_name():
    assert find_task("concepts") is TASKS["concepts"] and find_task("custom", "x").name == "custom"
    for name in ("custom", "concept"):
        with pytest.raises(DatasetError, match=f"custom needs a --dataset; got '{name}'"):
            find_task(name)
