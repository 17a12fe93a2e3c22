"""recipes/ppo_reward.py: its flags, what it refuses, and the algorithms it trains with."""

import json
import math
import runpy
import subprocess
from contextlib import nullcontext

import pytest
import torch
import yaml
from datasets import Dataset
from forked import warm_python
from peft import LoraConfig
from places import RECIPES
from recipe_runs import CONFIGS, launch, parse_ppo
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import rsoups
from rsoups.common.assets import resolve
from rsoups.training.checkpoints import finish_checkpoint, last_checkpoint


def test_without_flags_it_is_the_embedded_policy_on_the_first_reward():
    script, training, model = parse_ppo()
    assert (script.reward, script.task, model.model_name_or_path) == (["naturalness"], "concepts", "rsoups/tiny-llama")
    assert training.output_dir == "runs/ppo-naturalness"
    assert training.learning_rate == yaml.safe_load((CONFIGS / "embedded.yaml").read_text())["learning_rate"]


def test_flags_override_the_file():
    flags = ["--reward", "a", "b", "--reward_weights", ".5", ".5", "--learning_rate", "1e-5", "--kl_coef", "0.3"]
    script, training, _ = parse_ppo("--config", str(CONFIGS / "embedded.yaml"), *flags, "--output_dir", "x")
    assert (script.reward, training.reward_weights) == (["a", "b"], [0.5, 0.5])
    assert (training.learning_rate, training.kl_coef, training.output_dir) == (1e-5, 0.3, "x")


@pytest.mark.parametrize(("has", "dtype"), [(True, None), (False, "float32")])
def test_ones_own_base_needs_no_word_about_bf16(monkeypatch, has, dtype):
    """The processor decides; a base that is published in bfloat16 then stays so."""
    monkeypatch.setattr("rsoups.training.ppo_config.has_bf16", lambda: has)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    _, training, model = parse_ppo("--model_name_or_path", "mine")
    assert (training.bf16, training.learning_rate, training.mini_batch_size) == (has, 3e-4, 32)
    assert (model.dtype, training.use_cpu) == (dtype, True)
    _, training, model = parse_ppo("--model_name_or_path", "mine", "--bf16", "false")
    assert (training.bf16, model.dtype) == (False, "float32")
    assert parse_ppo("--model_name_or_path", "mine", "--dtype", "float32")[2].dtype == "float32"


def test_other_algorithms_leave_bf16_off_where_no_gpu_has_it(monkeypatch):
    monkeypatch.setattr("rsoups.training.run_arguments.is_torch_bf16_gpu_available", lambda: False)
    flags = ["--model_name_or_path", "mine", "--per_device_train_batch_size", "8"]
    assert parse_ppo(*flags, "--algorithm", "grpo")[1].bf16 is False


def test_a_pickled_adapter_is_not_trained_on(tmp_path, bomb):
    command = [warm_python(), str(RECIPES / "ppo_reward.py"), "--config", str(CONFIGS / "embedded.yaml")]
    command += ["--adapter_name_or_path", str(bomb.parent), "--output_dir", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode and "rsoups convert" in run.stderr
    assert not (tmp_path / "opened").exists()


@pytest.fixture
def bomb(tmp_path):
    """An adapter's pickle that would leave a trace."""

    class Bomb:
        def __reduce__(self):
            return ((tmp_path / "opened").touch, ())

    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    torch.save(Bomb(), tmp_path / "adapter" / "adapter_model.bin")
    return tmp_path / "adapter" / "adapter_model.bin"


def test_a_config_file_cannot_allow_pickles(tmp_path):
    (tmp_path / "mine.yaml").write_text((CONFIGS / "embedded.yaml").read_text() + "convert_pickles: true\n")
    with pytest.raises(rsoups.SettingsError, match="pass --convert_pickles on the command line"):
        parse_ppo("--config", str(tmp_path / "mine.yaml"))
    assert parse_ppo("--convert_pickles")[0].convert_pickles is True


@pytest.mark.parametrize(
    ("left", "flags", "refusal"),
    [
        ("finished", [], "holds a finished run: choose another --output_dir"),
        ("finished", ["--resume"], "holds a finished run without checkpoints"),
        ("interrupted", [], r"holds an interrupted run \(checkpoint-4\): pass --resume"),
        ("interrupted", ["--resume"], None),
        ("both", ["--resume"], None),
        ("both", ["--overwrite_output_dir", "true"], None),
        ("nothing", [], None),
    ],
)
def test_what_another_run_left_is_not_overwritten(tmp_path, left, flags, refusal):
    if left in ("finished", "both"):
        (tmp_path / "lineage.json").write_text("{}")
    if left in ("interrupted", "both"):
        (tmp_path / "partial").mkdir()
        finish_checkpoint(tmp_path / "partial", tmp_path / "checkpoint-4")
    recipe = runpy.run_path(str(RECIPES / "ppo_reward.py"))
    flags = ["--config", str(CONFIGS / "embedded.yaml"), "--bf16", "false", "--output_dir", str(tmp_path), *flags]
    script, training, _ = recipe["parse"](flags)
    with pytest.raises(rsoups.OutputError, match=refusal) if refusal else nullcontext():
        recipe["clear_folder"](script, training)
    assert (last_checkpoint(tmp_path) is not None) is (left != "nothing" and left != "finished" and "true" not in flags)


def test_unknown_keys_are_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("model_name_or_path: rsoups/tiny-llama\nlearning_rat: 1.0\nbf16: false\n")
    with pytest.raises(ValueError, match="learning_rat"):
        parse_ppo("--config", str(path))


def favourite(prompts, completions, **columns):
    return [float(text.split()[:1] == ["w7"]) for text in completions]


def twice_favourite(prompts, completions, **columns):
    return [2 * score for score in favourite(prompts, completions)]


@pytest.mark.parametrize(("weights", "sign"), [([-1.0], -1), ([1.0, -2.0], -1), ([1.0, -1.0], -1), ([3.0, -1.0], 1)])
def test_the_algorithms_agree_in_the_sign_of_reward_weights(tmp_path, weights, sign):
    """On the same texts, each prompt answered with w7 and with w3, one update moves log p of w7 up or down."""
    moved = {}
    for name, (settings, kind) in runpy.run_path(str(RECIPES / "ppo_reward.py"))["ALGORITHMS"].items():
        sizes = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "steps_per_generation": 1}
        args = settings(
            str(tmp_path / name), **sizes, num_generations=2, max_steps=1, learning_rate=1e-3, reward_weights=weights,
            bf16=False, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        tokenizer = tiny_tokenizer([f"w{i}" for i in range(20)])
        w7, w3 = tokenizer.convert_tokens_to_ids(["w7", "w3"])
        run = kind(
            tiny_llama(vocab_size=len(tokenizer)),
            [favourite, twice_favourite][: len(weights)],
            args,
            train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(16)]}),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
        )
        said = [[w7, 2], [w3, 2]] * 8
        run._generate_single_turn = lambda *prompts, said=said, name=name: said if name == "rloo" else (said, None)
        run._checked = True  # PPO's look at two responses before the first step
        ids = torch.tensor([[4, 5]])

        def logp(model=run.model, ids=ids, token=w7):
            with torch.no_grad():
                return float(model.eval()(input_ids=ids).logits[0, -1].log_softmax(-1)[token])

        before = logp()
        run.train()
        moved[name] = logp() - before
    assert {name: math.copysign(1, change) for name, change in moved.items()} == dict.fromkeys(moved, sign), moved
    assert len(moved) == 3 and min(map(abs, moved.values())) > 1e-3


@pytest.mark.slow
def test_a_dry_run_in_llama_7bs_shape(tmp_path):
    """Two steps with LLaMA-7b's widths, heads and vocabulary, two of its 32 layers, random bf16 weights, its own config."""
    torch.manual_seed(0)
    shape = LlamaConfig(num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    assert (shape.hidden_size, shape.intermediate_size, shape.vocab_size) == (4096, 11008, 32000)
    LlamaForCausalLM(shape).bfloat16().save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(resolve("rsoups/tiny-llama")).save_pretrained(tmp_path / "base")
    rows = [{"chosen": f"\n\nHuman: What is number {i}?\n\nAssistant: Number {i}."} for i in range(64)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = yaml.safe_load((CONFIGS / "llama7b-assistant.yaml").read_text())
    config |= {"model_name_or_path": str(tmp_path / "base"), "dataset": str(tmp_path / "rows.jsonl"), "use_cpu": True}
    config |= {
        "load_in_8bit": False,
        "reward": ["naturalness"],
        "generation_batch_size": 8,
        "max_steps": 2,
        "lora_r": 16,
    }
    config |= {"eval_prompts": 4, "output_dir": str(tmp_path / "out"), "lora_target_modules": ["q_proj", "v_proj"]}
    del config["adapter_name_or_path"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    launch(RECIPES / "ppo_reward.py", "--config", tmp_path / "config.yaml")
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert all(math.isfinite(row["loss"]) for row in history if "loss" in row)
    adapter = rsoups.interpolate([tmp_path / "out"])
    assert adapter.state_dict[sorted(adapter.state_dict)[0]].shape[-1] in (4096, 16)
