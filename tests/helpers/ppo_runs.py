"""Small PPO runs."""

from datasets import Dataset
from peft import LoraConfig, PeftModel
from tiny import tiny_llama, tiny_tokenizer

from rsoups import PPOConfig, PPOTrainer

WORDS = [f"w{i}" for i in range(20)]
PROMPTS = Dataset.from_dict({"prompt": [f"{a} {b}" for a in WORDS[:8] for b in WORDS[:8]]})
FAVOURITE = "w7"


def pays_for_one_word(prompts, completions, **columns):
    return [text.split().count(FAVOURITE) / 6 for text in completions]


def config(tmp_path, **overrides):
    settings = {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_steps": 4,
        "max_completion_length": 6,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "kl_coef": 0.02,
        "kl_target": None,
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return PPOConfig(**(settings | overrides))


def lora(**overrides):
    return LoraConfig(
        **({"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | overrides)
    )


def trainer(tmp_path, reward=pays_for_one_word, model=None, evaluate=False, **overrides):
    tokenizer = tiny_tokenizer(WORDS)
    model = model or tiny_llama(vocab_size=len(tokenizer))
    peft_config = None if isinstance(model, PeftModel) else lora()
    args = config(tmp_path, **overrides)
    data = {"train_dataset": PROMPTS, "eval_dataset": PROMPTS.select(range(8)) if evaluate else None}
    return PPOTrainer(model, reward, args, **data, processing_class=tokenizer, peft_config=peft_config)


def history(run, key):
    return [row[key] for row in run.state.log_history if key in row]


BARE = {"per_device_train_batch_size": None, "gradient_accumulation_steps": None, "steps_per_generation": None}

# 64 prompts in rollouts of 32, gone through twice in two minibatches: a rollout each 4 steps, an epoch each 8.
CUT = {"max_steps": 14, "save_strategy": "steps", "save_steps": 1, "kl_target": 0.05, "kl_horizon": 200}


def rollouts(run):
    """Train, and return what each rollout held."""
    seen = []
    real = run._rollout_tensors

    def spy(prompt_ids, response_ids):
        batch = real(prompt_ids, response_ids)
        seen.append((prompt_ids, response_ids, batch))
        return batch

    run._rollout_tensors, run._checked = spy, True  # without the two responses that are looked at before the first step
    run.train()
    return seen
