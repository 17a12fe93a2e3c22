"""Rows from files and folders, and the part of them that is held out."""

import gzip
import json
import os
import subprocess
import sys

import pytest
from datasets import Dataset

from rsoups import DatasetError
from rsoups.common.files import read_jsonl
from rsoups.data.datasets import load_rows, train_and_held_out
from rsoups.data.prompts import question_of
from rsoups.data.tasks import TASKS, custom_task


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


def test_the_demos_prompts_do_not_leak_between_train_and_test():
    train, test = (load_rows(TASKS["concepts"], None, split) for split in ("train", "test"))
    sets = [{frozenset(question_of(row["prompt"]).split(", ")) for row in rows} for rows in (train, test)]
    assert len(sets[0]) == len(train) == 4096 and len(sets[1]) == len(test) == 256
    assert not sets[0] & sets[1]
