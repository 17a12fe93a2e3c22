"""recipes/ppo_reward.py and recipes/sweep.py on datasets of one's own: their columns, references and splits."""

import gzip
import json
import runpy
import subprocess

import pytest
from forked import warm_python
from places import RECIPES
from recipe_runs import CONFIGS, SHORT, launch
from transformers import AutoTokenizer, LlamaConfig

import rsoups
from rsoups.common.assets import resolve
from rsoups.common.files import read_jsonl
from rsoups.training.run_data import ASKED, read_prompts


def test_responses_begin_with_tokens_of_a_reference(tmp_path):
    rows = [{"concepts": [f"dog{i}", "run"], "sentences": ["a dog runs home in the rain today."]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = runpy.run_path(str(RECIPES / "ppo_reward.py"))
    flags = ["--dataset", str(tmp_path / "rows.jsonl"), "--prefix_tokens", "2", "5", "--bf16", "false"]
    tokenizer = AutoTokenizer.from_pretrained(resolve("rsoups/tiny-llama"))

    def made(*more):
        script, training, _ = recipe["parse"](["--config", str(CONFIGS / "embedded.yaml"), *flags, *more])
        return read_prompts(script, training, tokenizer, 100)[0]["prompt"]

    starts = [text.partition("### Response: ")[2] for text in made()]
    whole = "a dog runs home in the rain today."
    assert set(starts) == {"a dog", "a dog runs", "a dog runs home", "a dog runs home in"} and whole.startswith(
        starts[0]
    )
    assert made() == made() != made("--seed", "1")
    with pytest.raises(rsoups.SettingsError, match="takes two numbers"):
        made("--prefix_tokens", "3")


def test_references_stay_with_their_prompts(tmp_path):
    """Where prompts are dropped, and where they go on with a reference's first words."""
    texts = ["dog", "dog " * 40, "cat", "boat " * 30]
    rows = [{"prompt": f"{text} {i}", "references": [f"a {text[:3]} {i}."], "n": i} for i, text in enumerate(texts)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = runpy.run_path(str(RECIPES / "ppo_reward.py"))
    flags = ["--task", "custom", "--dataset", str(tmp_path), "--long_prompts", "drop", "--eval_prompts", "1"]
    tokenizer = AutoTokenizer.from_pretrained(resolve("rsoups/tiny-llama"))
    for more, start in (([], ("", "")), (["--prefix_tokens", "2", "2"], ("a dog", "a cat"))):
        script, training, _ = recipe["parse"](["--config", str(CONFIGS / "embedded.yaml"), *flags, *more])
        train, held_out = read_prompts(script, training, tokenizer, 20, ["n"])
        asked = train.pop(ASKED, train["prompt"])  # what lineage.json marks: no dropped row, no prefix
        assert asked == ["dog 0", "cat 2"] and held_out.pop(ASKED, asked[:1]) == asked[:1]
        assert train == {
            "prompt": ["dog 0" + start[0], "cat 2" + start[1]],
            "references": [["a dog 0."], ["a cat 2."]],
            "n": [0, 2],
        }
        assert held_out == {name: values[:1] for name, values in train.items()}


def test_the_assistant_task_runs_on_any_file_in_the_format_of_hh_rlhf(tmp_path):
    with gzip.open(tmp_path / "hh.jsonl.gz", "wt") as file:
        for i in range(80):
            turns = f"\n\nHuman: How do I mend {i} socks?\n\nAssistant: With a needle.\n\nHuman: Ok\n\nAssistant: Bye."
            file.write(json.dumps({"chosen": turns, "rejected": turns}) + "\n")
    flags = [
        "--config",
        CONFIGS / "embedded.yaml",
        "--task",
        "assistant",
        "--dataset",
        tmp_path / "hh.jsonl.gz",
        *SHORT,
    ]
    launch(RECIPES / "ppo_reward.py", "--reward", "naturalness", "--output_dir", tmp_path / "run", *flags)
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "held_out_results.json").read_text())["after"].keys() >= {"reward", "kl"}


def test_rewards_read_references_and_columns_of_the_data(tmp_path):
    """A statistical card and a function of TRL's signature, each of which is right only about its own row."""
    (tmp_path / "own.py").write_text(
        "def right(prompts, completions, number, references, **rest):\n"
        "    assert all(f'word{n}' in p and r == [f'a word{n}.'] for n, p, r in zip(number, prompts, references))\n"
        "    return [0.0] * len(prompts)\n"
    )
    rows = [{"prompt": f"word{i}", "references": [f"a word{i}."], "number": i} for i in range(80)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--task", "custom", "--dataset", "rows.jsonl", "--eval_prompts", 4, *SHORT]
    for algorithm, config in (("ppo", "embedded"), ("grpo", "embedded-grpo")):
        more = ["--config", CONFIGS / f"{config}.yaml", "--algorithm", algorithm, "--reward", "rouge-l", "own:right"]
        launch(RECIPES / "ppo_reward.py", *flags, *more, "--output_dir", tmp_path / algorithm, cwd=tmp_path)
        held_out = json.loads((tmp_path / algorithm / "held_out_results.json").read_text())
        assert 0 <= held_out["before"]["reward"] < 0.5


def test_a_statistical_reward_wants_references_before_anything_is_loaded(tmp_path):
    """The base is not there: had it been loaded first, the error would be another one."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}')
    base = tmp_path / "base"
    AutoTokenizer.from_pretrained(resolve("rsoups/tiny-llama")).save_pretrained(base)
    LlamaConfig().save_pretrained(base)
    command = [warm_python(), str(RECIPES / "ppo_reward.py"), "--model_name_or_path", str(base), "--bf16", "false"]
    command += ["--task", "custom", "--dataset", str(tmp_path / "rows.jsonl"), "--reward", "meteor"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert run.returncode and "reward 'meteor' needs a column 'references', the dataset gives ['prompt']" in run.stderr


def test_columns_and_the_split_are_the_same_in_ppo_and_the_sweep_of_one_file(tmp_path):
    """A reward fails where it gets other than its row's own value; the sweep evaluates what the run held out."""
    (tmp_path / "own.py").write_text(
        "def own(prompts, responses, spec, answer):\n"
        "    for p, s, a in zip(prompts, spec, answer):\n"
        "        i = int(p.split()[-1])\n"
        "        assert s == {f'k{i % 3}': i} and (a, type(a)) == ((i, int) if i % 2 else (str(i), str)), (p, s, a)\n"
        "    return [None if i % 2 else 1.0 for i in range(len(prompts))]\n"
    )
    rows = [{"prompt": f"Write {i}", "spec": {f"k{i % 3}": i}, "answer": i if i % 2 else str(i)} for i in range(80)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--task", "custom", "--dataset", "rows.jsonl"]
    flags = [
        *data,
        *SHORT,
        "--config",
        CONFIGS / "embedded.yaml",
        "--reward",
        "length",
        "own:own",
        "--eval_prompts",
        "4",
    ]
    launch(RECIPES / "ppo_reward.py", *flags, "--output_dir", tmp_path / "run", cwd=tmp_path)
    manifest = json.loads((tmp_path / "run" / "lineage.json").read_text())
    assert manifest["data"]["rows"] == 72 and manifest["data"]["held_out"]["rows"] == 4
    assert (
        manifest["data"]["held_out"]["rule"].startswith("the last tenth")
        and manifest["data"]["prompt_marks"]["one_in"] == 1
    )
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert any(row.get("abstained/own") == 0.5 for row in log)

    sweep = [
        warm_python(),
        str(RECIPES / "sweep.py"),
        *data,
        "--adapters",
        "a=run",
        "--reward",
        "own:own",
        "--points",
        "2",
    ]
    sweep += ["--max_new_tokens", "4", "--output_dir"]
    done = subprocess.run([*sweep, "ok"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 prompts: the part of rows.jsonl that is held out" in done.stdout
    assert {r["prompt"] for r in read_jsonl(tmp_path / "ok" / "records.jsonl")} == {f"Write {i}" for i in range(72, 80)}
    done = subprocess.run([*sweep, "no", "--split", "all"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode and "of 80 prompts, a on 72 were trained on" in done.stderr
