"""recipes/reward_model.py, from pairs to scores."""

import json
import runpy
import sys

from places import RECIPES

import rsoups


def test_a_reward_model_of_conversations_with_an_adapter_is_a_reward(tmp_path, monkeypatch, capsys):
    """From pairs to scores: the head is kept, the base is named as the user did, and the chosen ones score higher."""
    rows = []
    for i in range(24):
        ask = {"role": "user", "content": [{"type": "text", "text": f"dog, run {i}"}]}
        good, bad = ({"role": "assistant", "content": text} for text in ("A dog runs fast.", "Cats sleep."))
        rows.append(
            {"chosen": [ask, good], "rejected": [ask, bad]}
            if i % 2
            else {"prompt": [ask], "chosen": [good], "rejected": [bad]}
        )
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = [
        "--model_name_or_path",
        "rsoups/tiny-llama",
        "--dataset",
        str(tmp_path / "pairs.jsonl"),
        "--output_dir",
        str(tmp_path / "rm"),
    ]
    flags += [
        "--use_peft",
        "true",
        "--lora_r",
        "4",
        "--lora_target_modules",
        "q_proj",
        "v_proj",
        "--use_cpu",
        "true",
        "--bf16",
        "false",
    ]
    flags += [
        "--max_steps",
        "12",
        "--learning_rate",
        "1e-2",
        "--report_to",
        "none",
        "--save_strategy",
        "no",
        "--disable_tqdm",
        "true",
    ]
    monkeypatch.setattr(sys, "argv", ["reward_model.py", *flags])
    runpy.run_path(str(RECIPES / "reward_model.py"), run_name="__main__")
    config = json.loads((tmp_path / "rm" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "rsoups/tiny-llama" and config["task_type"] == "SEQ_CLS"
    reward = rsoups.load_reward(tmp_path / "rm")
    good, bad = reward(["dog, run 1"] * 2, ["A dog runs fast.", "Cats sleep."])
    assert good > bad + 0.5 and rsoups.load_reward(tmp_path / "rm")(["dog, run 1"], ["Cats sleep."]) == [bad]
