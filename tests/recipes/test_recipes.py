"""The recipes: what they parse, and the whole chain on the embedded models, short."""

import ast
import gzip
import json
import math
import random
import runpy
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset
from peft import LoraConfig
from places import RECIPES, ROOT
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import ModelConfig, RewardConfig, SFTConfig, TrlParser

import rsoups
from rsoups.common.assets import resolve
from rsoups.common.files import read_jsonl
from rsoups.data.tasks import TASKS
from rsoups.rewards.load import cards
from rsoups.training.checkpoints import finish_checkpoint, last_checkpoint
from rsoups.training.run_data import ASKED, read_prompts

CONFIGS = RECIPES / "configs"


def parse_ppo(*argv):
    return runpy.run_path(str(RECIPES / "ppo_reward.py"))["parse"](list(argv))


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


def test_ones_own_base_needs_no_word_about_bf16_where_no_gpu_has_it(monkeypatch):
    monkeypatch.setattr("rsoups.training.run_arguments.is_torch_bf16_gpu_available", lambda: False)
    _, training, _ = parse_ppo("--model_name_or_path", "mine")
    assert (training.bf16, training.learning_rate, training.mini_batch_size) == (False, 3e-4, 32)
    assert parse_ppo("--model_name_or_path", "mine", "--use_cpu", "true")[1].bf16 is True


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("llama7b-*.yaml")), ids=lambda path: path.stem)
def test_the_papers_set_up_parses(path):
    """Batch 128 in mini-batches of 4, 4 epochs, lr 1.41e-5, adaptive KL .2 (target 6, horizon 10,000): FACTS of the paper."""
    script, training, model = parse_ppo("--config", str(path), "--bf16", "false")
    assert (model.model_name_or_path, model.load_in_8bit) == ("huggyllama/llama-7b", True)
    assert script.adapter_name_or_path == "tloen/alpaca-lora-7b"
    assert all(name in cards() for name in script.reward)
    assert (training.generation_batch_size, training.mini_batch_size, training.num_iterations) == (128, 4, 4)
    assert (training.learning_rate, training.kl_coef, training.kl_target, training.kl_horizon) == (
        1.41e-5,
        0.2,
        6,
        10000,
    )
    assert (training.gamma, training.lam, training.cliprange, training.cliprange_value) == (1, 0.95, 0.2, 0.2)
    assert training.vf_coef == 0.1
    assert (training.min_completion_length, training.max_completion_length, script.prefix_tokens) == (16, 32, [2, 8])
    assert training.save_steps == 10 * 4 * 128 // 4
    task = path.stem.removeprefix("llama7b-")
    assert (script.task, script.dataset) == (task, TASKS[task].dataset)


def test_there_is_a_config_for_each_of_the_papers_tasks():
    found = {path.stem.removeprefix("llama7b-") for path in CONFIGS.glob("llama7b-*.yaml")}
    assert found == TASKS.keys() - {"concepts"}


def test_a_pickled_adapter_is_not_trained_on(tmp_path, bomb):
    command = [sys.executable, str(RECIPES / "ppo_reward.py"), "--config", str(CONFIGS / "embedded.yaml")]
    command += ["--adapter_name_or_path", str(bomb.parent), "--output_dir", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode and "rsoups convert" in run.stderr
    assert not (tmp_path / "opened").exists()


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


HELPED = [path.stem for path in sorted(RECIPES.glob("*.py")) if path.stem != "__init__"]


@pytest.mark.parametrize("name", HELPED)
def test_a_recipes_help_describes_every_flag_and_shows_defaults(name, monkeypatch, capsys):
    """And each recipe opens with what it does, its launch line, and how it differs from the paper."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    recipe = RECIPES / f"{name}.py"
    with pytest.raises(SystemExit):
        runpy.run_path(str(recipe), run_name="__main__")
    shown = " ".join(capsys.readouterr().out.split())
    text = ast.get_docstring(ast.parse(recipe.read_text("utf-8")))
    first = " ".join(text.splitlines()[0].split())
    assert first in shown and "(default: " in shown
    assert f"recipes/{name}.py" in text or f"rsoups {name}" in text
    assert "differs from" in " ".join(text.split())


def test_unknown_keys_are_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("model_name_or_path: rsoups/tiny-llama\nlearning_rat: 1.0\nbf16: false\n")
    with pytest.raises(ValueError, match="learning_rat"):
        parse_ppo("--config", str(path))


@pytest.mark.parametrize(
    ("recipe", "kind", "config"),
    [
        ("sft", SFTConfig, "embedded-sft"),
        ("sft", SFTConfig, "embedded-sft-copying"),
        ("reward_model", RewardConfig, "embedded-coverage"),
        ("reward_model", RewardConfig, "embedded-coverage-sampled"),
        ("reward_model", RewardConfig, "embedded-naturalness"),
        ("reward_model", RewardConfig, "embedded-rating"),
    ],
)
def test_the_embedded_models_configs_parse(recipe, kind, config):
    arguments = runpy.run_path(str(RECIPES / f"{recipe}.py"))["ScriptArguments"]
    parser = TrlParser((arguments, kind, ModelConfig))
    script, training, _ = parser.parse_args_and_config(["--config", str(CONFIGS / f"{config}.yaml")])
    assert training.seed == 0 and script.dataset.endswith("_train.jsonl.gz")


@pytest.fixture(scope="module")
def prepare():
    return runpy.run_path(str(RECIPES / "embedded" / "prepare.py"))


HUMAN = [{"concepts": ["dog", "run"], "sentences": ["A  dog running fast .", "the old dogs run home in the rain?"]}] * 5


def test_embedded_sentences_are_in_one_style(prepare):
    assert prepare["tidy_sentence"]("A  dog runs ,fast .") == "a dog runs,fast."
    assert prepare["tidy_sentence"]("Who is it?") == "who is it?"


def test_sentences_to_copy_hold_what_their_prompts_ask_for(prepare):
    rows = prepare["copying_rows"](HUMAN, random.Random(0))
    assert len(rows) == 2 * prepare["COPYING_VARIANTS"]
    for row in rows:
        words = [word for word, _ in prepare["split"](row["sentences"][0]) if prepare["is_content"](word)]
        for concept in row["concepts"]:
            assert any(concept in (word, prepare["lemma"](word, Counter(["dog", "run"]))) for word in words), row
        assert len(words) == len(row["concepts"])


def test_a_word_is_one_token_wherever_it_stands(prepare):
    tokenizer = prepare["policy_tokenizer"](["the dog runs home.", "a dog, the dog runs"] * 20)
    prompt = TASKS["concepts"].prompt({"concepts": ["dog", "runs"]})
    apart = tokenizer(prompt)["input_ids"], tokenizer("dog runs home.")["input_ids"]
    assert tokenizer(prompt + "dog runs home.")["input_ids"] == apart[0] + apart[1]
    assert tokenizer.tokenize("dog runs dog") == ["Ġdog", "Ġruns", "Ġdog"]


def launch(*arguments, cwd=None):
    """As a user does, in a process of its own."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert run.returncode == 0, run.stderr[-3000:]


SHORT = ["--per_device_train_batch_size", 8, "--max_steps", 4, "--max_completion_length", 8, "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One short PPO run for each of two rewards, and the first one again."""
    root = tmp_path_factory.mktemp("runs")
    for name, reward in (("naturalness", "naturalness"), ("coverage", "coverage"), ("again", "naturalness")):
        launch(RECIPES / "ppo_reward.py", "--reward", reward, "--output_dir", root / name, *SHORT)
    return root


def test_the_same_seed_gives_the_same_adapter(runs):
    first, again, other = (
        (runs / name / "adapter_model.safetensors").read_bytes() for name in ("naturalness", "again", "coverage")
    )
    assert first == again and first != other


def test_the_adapter_names_its_base_as_the_user_did(runs):
    config = json.loads((runs / "coverage" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "rsoups/tiny-llama"


def test_from_adapters_to_the_report(runs, tmp_path):
    """With `--method factors` too, both runs start from one initialization; then on a dataset's own prompts and references."""
    adapters = [f"{name}={runs / name}" for name in ("naturalness", "coverage")]
    flags = ["--adapters", *adapters, "--reward", "naturalness", "coverage", "--others", f"MORL={runs / 'again'}"]
    flags += ["--prompts", "6", "--points", "3", "--max_new_tokens", "8"]
    rows = [{"words": f"dog, run {i % 6}", "reference": "a dog runs"} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text(
        "def said(prompts, responses, references): return [float(len(r)) for r in references]"
    )
    own = {"exact": ["--ensemble", "true", "--held_out_reward", "rating"]}
    own["factors"] = [
        "--task",
        "custom",
        "--dataset",
        "rows.jsonl",
        "--template",
        "Use {words}:",
        "--samples",
        "2",
        "--split",
        "all",
    ]
    own["factors"] += ["--held_out_reward", "mine:said"]
    for method in ("exact", "factors"):
        out = tmp_path / method
        command = [sys.executable, str(RECIPES / "sweep.py"), *flags, *own[method], "--method", method]
        run = subprocess.run(
            [*command, "--output_dir", str(out)], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert run.returncode == 0, run.stderr[-3000:]
        assert "| λ 0.5 / 0.5 |" in run.stdout and "| MORL |" in run.stdout
        records = read_jsonl(out / "records.jsonl")
        assert len(records) == 6 * (6 if method == "exact" else 5 * 2)
        assert {"front.png", "report.html", "report.md"} <= {path.name for path in out.iterdir()}
        front = rsoups.Front.from_jsonl(out / "records.jsonl")
        held_out = "rating" if method == "exact" else "said"
        assert front.rewards == sorted(["coverage", "naturalness", held_out]) and len(front.soups) == 3
        settings = json.loads((out / "records.settings.json").read_text())
        assert settings["held_out"] == [held_out] and settings["base"] == "rsoups/tiny-llama"
        assert (out / settings["adapters"]["coverage"]).resolve() == runs / "coverage"
        if method == "factors":
            assert {r["prompt"] for r in records} == {f"Use dog, run {i}:" for i in range(6)}
            assert all(r["rewards"]["said"] == 1 for r in records), "one reference for each prompt"


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


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_adapters_of_other_algorithms_go_into_the_same_soup(runs, tmp_path, algorithm):
    flags = ["--config", CONFIGS / "embedded-grpo.yaml", "--algorithm", algorithm, "--reward", "coverage", *SHORT]
    flags += ["--reward_weights", -2]
    launch(RECIPES / "ppo_reward.py", *flags, "--eval_prompts", 8, "--output_dir", tmp_path / algorithm)
    soup = rsoups.interpolate(
        [tmp_path / algorithm, runs / "naturalness"], [0.5, 0.5], method="factors"
    )  # one initialization
    assert soup.lambdas == (0.5, 0.5)
    held_out = json.loads((tmp_path / algorithm / "held_out_results.json").read_text())
    assert held_out["before"].keys() == held_out["after"].keys() >= {"reward"}
    logs = json.loads((tmp_path / algorithm / "trainer_state.json").read_text())["log_history"]
    log = next(log for log in logs if "reward" in log)
    assert log["reward"] == pytest.approx(-log["rewards/coverage/mean"], abs=1e-5), "divided by |-2|"


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
    command = [sys.executable, str(RECIPES / "ppo_reward.py"), "--model_name_or_path", str(base), "--bf16", "false"]
    command += ["--task", "custom", "--dataset", str(tmp_path / "rows.jsonl"), "--reward", "meteor"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert run.returncode and "reward 'meteor' needs a column 'references', the dataset gives ['prompt']" in run.stderr


def test_an_adapter_can_be_trained_on(runs, tmp_path):
    flags = ["--config", CONFIGS / "embedded.yaml", "--adapter_name_or_path", runs / "naturalness", *SHORT]
    launch(RECIPES / "ppo_reward.py", "--reward", "coverage", "--output_dir", tmp_path / "on", *flags)
    names = {path.name for path in (tmp_path / "on").iterdir()}
    assert "adapter_model.safetensors" in names
    rsoups.interpolate([tmp_path / "on", runs / "naturalness"])


@pytest.mark.parametrize(
    ("path", "kind", "machines"),
    [
        ("accelerate_config.yaml", "MULTI_GPU", 1),
        ("recipes/accelerate/zero2.yaml", "DEEPSPEED", 1),
        ("recipes/accelerate/zero3.yaml", "DEEPSPEED", 1),
        ("recipes/accelerate/fsdp2.yaml", "FSDP", 1),
        ("recipes/accelerate/multi_node.yaml", "MULTI_GPU", 2),
    ],
)
def test_accelerate_reads_its_configs(path, kind, machines):
    config = load_config_from_file(str(ROOT / path))  # refuses unknown keys
    assert (config.distributed_type, config.num_machines, config.mixed_precision) == (kind, machines, "bf16")
    assert not config.use_cpu and config.num_processes > machines


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
        sys.executable,
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
