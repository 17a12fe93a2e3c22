"""rsoups.PPOTrainer beside TRL 1.12's PPOTrainer: the same work in turn, in one run.

    make bench-ppo                                                  # the embedded policy, two CPU cores, a few minutes
    python benchmarks/ppo.py --shape llama7b --episodes 512         # a CUDA GPU: LLaMA-7b's shape, random weights, bf16
    python benchmarks/ppo.py --shape llama7b --layers 2 --episodes 64 --rounds 1                     # a dry run of that

Same base, prompts, LoRA, batch (64 responses, 2 PPO epochs, minibatches of 32), response length, temperature, KL
coefficient and reward: the share of a sequence's tokens with odd ids, times 4,
cheap for both so that the trainers are what is measured; --reward deberta adds what a DeBERTa-v3-large of random weights
costs to both. TRL's critic is a second model, as it asks; of LLaMA-7b's shape one with a LoRA.

Each measurement is a process of its own. Written to benchmarks/results/: episodes per second of training, peak memory
beyond the base (RSS on a CPU, allocated on a GPU), mean reward of the last quarter of the episodes; medians and ratios.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHONS = {"rsoups": ROOT / ".venv/bin/python", "trl": ROOT / ".venv-oracle/bin/python"}
ROLLOUT, MINIBATCH, EPOCHS, LENGTH, TEMPERATURE = 64, 32, 2, 24, 0.7
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
COMMON = {"learning_rate": 1e-3, "kl_coef": 0.05, "temperature": TEMPERATURE, "report_to": "none", "save_strategy": "no",
          "logging_steps": 1, "disable_tqdm": True, "seed": 0, "lr_scheduler_type": "constant"}  # fmt: skip


# --- one measurement -------------------------------------------------------------------------------------------------


def tokenizer_and_prompts(count):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "rsoups/assets/tiny-llama", padding_side="left")
    lines = (ROOT / "rsoups/assets/concepts/train.jsonl").read_text().splitlines()
    words = [", ".join(json.loads(line)["concepts"]) for line in lines[:count]]
    prompts = ["### Instruction: Write one sentence that uses these words. ### Input: " + w for w in words]
    return tokenizer, [prompt + " ### Response: " for prompt in prompts]


def rsoups_trainer(args, base, folder):
    import torch
    from datasets import Dataset
    from peft import LoraConfig

    from rsoups import PPOConfig, PPOTrainer

    tokenizer, prompts = tokenizer_and_prompts(1024)

    def reward(prompts, completions, completion_ids, **columns):
        ids = tokenizer(prompts)["input_ids"]
        rows = [a + b for a, b in zip(ids, completion_ids, strict=True)]
        return [4 * sum(token % 2 for token in row) / len(row) for row in rows]

    gpu = torch.cuda.is_available()
    config = PPOConfig(
        output_dir=folder, per_device_train_batch_size=MINIBATCH, steps_per_generation=ROLLOUT // MINIBATCH,
        gradient_accumulation_steps=1, num_iterations=EPOCHS, max_completion_length=LENGTH, kl_target=None, bf16=gpu,
        max_steps=args.episodes // ROLLOUT * EPOCHS * (ROLLOUT // MINIBATCH), activation_checkpointing=False,
        kl_limit=None, use_cpu=not gpu, dataloader_pin_memory=gpu, **COMMON,
    )  # fmt: skip
    rewards = [reward, *([deberta_reward(args, tokenizer)] if args.reward == "deberta" else [])]
    return PPOTrainer(
        base, rewards, config, train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip


def deberta_reward(args, tokenizer):
    """Zero for every response, at the price of an OpenAssistant reward: DeBERTa-v3-large's shape reads prompt and response."""
    score = deberta_scores(args)

    def deberta(prompts, completions, completion_ids, **columns):
        import torch

        rows = [a + b for a, b in zip(tokenizer(prompts)["input_ids"], completion_ids, strict=True)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return [0.0 * value for value in score(ids, mask).tolist()]

    return deberta


def deberta_scores(args):
    """A function of ids and mask (B, T) that returns DeBERTa's scores (B,), in bfloat16 on a GPU."""
    import shapes
    import torch

    model = shapes.deberta_v3_large(tiny=args.shape == "tiny").to(shapes.DEVICE)

    def score(ids, mask):
        half = torch.autocast(shapes.DEVICE, torch.bfloat16, enabled=shapes.DEVICE == "cuda")
        with torch.inference_mode(), half:
            return model(input_ids=ids.to(shapes.DEVICE), attention_mask=mask.to(shapes.DEVICE)).logits[:, 0].float()

    return score


def trl_trainer(args, base, folder):
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import LlamaForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer, prompts = tokenizer_and_prompts(1024)
    scores = deberta_scores(args) if args.reward == "deberta" else None

    class Backbone(torch.nn.Module):
        def forward(self, input_ids, attention_mask, **kwargs):
            # (B, T, 1): running share of favored tokens; TRL reads it at a response's last token.
            good = ((input_ids % 2 == 1) & attention_mask.bool()).float().cumsum(1)
            share = 4 * good / attention_mask.cumsum(1).clamp(min=1)
            if scores is not None:
                share = share + 0.0 * scores(input_ids, attention_mask.long())[:, None]
            return type("Output", (), {"hidden_states": [share.unsqueeze(-1)]})()

    class Reward(torch.nn.Module):
        base_model_prefix = "backbone"

        def __init__(self):
            super().__init__()
            self.backbone, self.score = Backbone(), torch.nn.Identity()

    shape = copy.deepcopy(base.config)
    shape.num_labels = 1
    torch.set_default_dtype(base.dtype)
    with torch.device(base.device):
        critic = LlamaForSequenceClassification(shape)
    torch.set_default_dtype(torch.float32)
    critic.model.load_state_dict(base.model.state_dict())
    torch.nn.init.zeros_(critic.score.weight)
    if args.shape == "llama7b":  # a second model of 7B trained as a whole takes 54 GB, so that nothing else fits a card
        critic = with_lora(critic)
    gpu = torch.cuda.is_available()
    config = PPOConfig(
        output_dir=folder, per_device_train_batch_size=ROLLOUT, num_mini_batches=ROLLOUT // MINIBATCH,
        gradient_accumulation_steps=1, num_ppo_epochs=EPOCHS, response_length=LENGTH, total_episodes=args.episodes,
        local_rollout_forward_batch_size=ROLLOUT, num_sample_generations=0, stop_token="eos", bf16=gpu, use_cpu=not gpu,
        **COMMON,
    )  # fmt: skip
    return PPOTrainer(
        args=config, processing_class=tokenizer, model=base, ref_model=None, reward_model=Reward(), value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": [tokenizer(p)["input_ids"] for p in prompts]}),
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip


def with_lora(critic):
    """TRL's critic with a LoRA like the policy's, its head trained too: a choice in TRL's favor."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    critic = inject_adapter_in_model(LoraConfig(**LORA | {"task_type": "SEQ_CLS"}), critic)
    for parameter in critic.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)  # as PEFT does for the policy's
    critic.score.requires_grad_(True)
    return critic


def measure(args):
    import peft
    import shapes
    import torch
    import transformers
    import trl

    base = shapes.base_model(args.shape, args.layers)
    before, _ = shapes.memory()
    with tempfile.TemporaryDirectory() as folder:
        trainer = {"rsoups": rsoups_trainer, "trl": trl_trainer}[args.worker](args, base, folder)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    key = "reward" if args.worker == "rsoups" else "objective/scores"
    rewards = [row[key] for row in trainer.state.log_history if key in row]
    kls = [row[k] for row in trainer.state.log_history for k in ("kl", "objective/kl") if k in row]
    tail = max(1, len(rewards) // 4)
    print(
        json.dumps(
            {
                "episodes_per_second": args.episodes / seconds,
                "peak_memory_beyond_base_mb": (shapes.memory()[1] - before) / 2**20,
                "reward_first": rewards[0],
                "reward_last_quarter": statistics.mean(rewards[-tail:]),
                "kl_last_quarter": statistics.mean(kls[-tail:]),
                "rollouts": len(rewards),
                "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl, peft)},
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
            }
        )
    )


# --- all of them -----------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("embedded", "tiny", "smollm2", "llama7b"), default="embedded")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--reward", choices=("tokens", "deberta"), default="tokens")
    parser.add_argument("--episodes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=sorted(PYTHONS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return measure(args)

    names = ["trl", "rsoups"]
    found = {name: [] for name in names}
    flags = [f"--{key}={value}" for key, value in vars(args).items() if value is not None and key != "rounds"]
    for number in range(args.rounds):
        for name in names if number % 2 else reversed(names):
            command = [PYTHONS[name], __file__, *flags, "--worker", name]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                sys.exit(f"{name} failed:\n{run.stderr[-3000:]}")
            found[name].append(json.loads(run.stdout.strip().splitlines()[-1]))
            print(
                f"round {number + 1}: {name:7}",
                {k: v for k, v in found[name][-1].items() if k != "versions"},
                flush=True,
            )
    figures = ("episodes_per_second", "peak_memory_beyond_base_mb", "reward_last_quarter", "kl_last_quarter")
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in figures} for name, runs in found.items()
    }
    result = {"command": " ".join(sys.argv), "cores": os.cpu_count(), "medians": medians, "runs": found}
    result["ratio"] = {key: medians["rsoups"][key] / medians["trl"][key] for key in figures[:2]}
    out = ROOT / "benchmarks/results" / f"ppo-{args.shape}{'' if args.reward == 'tokens' else '-deberta'}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("medians", "ratio")}, indent=2), f"\n{out}")


if __name__ == "__main__":
    main()
