"""rsoups.PPOTrainer beside TRL 1.12's PPOTrainer: the same work in turn, in one run.

    make bench-ppo                                                  # the embedded policy, two CPU cores, a few minutes
    python benchmarks/ppo.py --shape llama7b --episodes 512         # a CUDA GPU: LLaMA-7b's shape, random weights, bf16
    python benchmarks/ppo.py --shape llama7b --layers 2 --episodes 64 --rounds 1                     # a dry run of that
    python benchmarks/ppo.py --shape smollm2 --base FOLDER --episodes 64 --rounds 1                  # SmolLM2-135M on a CPU
    git worktree add OLD COMMIT && python benchmarks/ppo.py ... --old OLD --trainers rsoups old      # beside an older commit

Same base, prompts, LoRA, batch (64 responses, 2 PPO epochs, minibatches of 32; of SmolLM2 32 and 16), response length,
temperature, KL coefficient and reward: the share of a sequence's tokens with odd ids, times 4,
cheap for both so that the trainers are what is measured; --reward deberta adds what a DeBERTa-v3-large of random weights
costs to both. TRL's critic is a second model, as it asks; of LLaMA-7b's shape one with a LoRA.
TRL's own loop never recomputes activations. `rsoups-float32` and others are the two in one precision;
`old` is rsoups of another folder with its defaults of then: float32, activation checkpointing.
Without --base, SmolLM2's shape has random weights (and the embedded policy's tokenizer): such a policy ends by chance only.

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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAINERS = ("rsoups", "trl", "old", "rsoups-float32", "rsoups-bfloat16", "trl-bfloat16")
EPOCHS = 2
COMMON = {"kl_coef": 0.05, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
          "lr_scheduler_type": "constant"}  # fmt: skip
INSTRUCTION = "Write one sentence that uses these words"


@dataclass
class Shape:
    """The work of both trainers."""

    rollout: int
    minibatch: int
    length: int
    rank: int
    learning_rate: float
    temperature: float

    @property
    def common(self):
        return COMMON | {"learning_rate": self.learning_rate, "temperature": self.temperature}

    @property
    def lora(self):
        task = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        return {"r": self.rank, "lora_alpha": 2 * self.rank} | task


SHAPES = {
    "embedded": Shape(64, 32, 24, 16, 1e-3, 0.7),
    "llama7b": Shape(64, 32, 24, 16, 1e-3, 0.7),
    "smollm2": Shape(32, 16, 40, 8, 5e-4, 1.0),
    "tiny": Shape(64, 32, 24, 16, 1e-3, 0.7),
}


# --- one measurement -------------------------------------------------------------------------------------------------


def base_model(args):
    import shapes
    import torch

    dtype = torch.bfloat16 if args.bf16 and args.shape != "embedded" else torch.float32  # what is published, or float32
    return shapes.base_model(args.shape, args.layers, dtype, args.base)


def tokenizer_and_prompts(args, count):
    """Tokenizer, and prompts as texts: through the chat template where there is one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.base or ROOT / "rsoups/assets/tiny-llama", padding_side="left")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:  # TRL masks every token that equals the padding
        tokenizer.pad_token = "<|endoftext|>"
    # TRL 1.12's environment has no rsoups, so its reader of JSON lines is not used.
    lines = (ROOT / "rsoups/assets/concepts/train.jsonl").read_text().splitlines()
    words = [", ".join(json.loads(line)["concepts"]) for line in lines[:count]]
    if tokenizer.chat_template:  # about 60 tokens, of which the template's and the instruction's are in all prompts
        pairs = zip(words, words[1:] + words[:1], strict=True)
        chats = [[{"role": "user", "content": f"{INSTRUCTION}: {w}. Leave these out: {v}"}] for w, v in pairs]
        return tokenizer, [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    return tokenizer, [f"### Instruction: {INSTRUCTION}. ### Input: {w} ### Response: " for w in words]


def rsoups_trainer(args, base, folder):
    import torch
    from datasets import Dataset
    from peft import LoraConfig

    from rsoups import PPOConfig, PPOTrainer

    tokenizer, prompts = tokenizer_and_prompts(args, 1024)

    def reward(prompts, completions, completion_ids, **columns):
        ids = tokenizer(prompts)["input_ids"]
        rows = [a + b for a, b in zip(ids, completion_ids, strict=True)]
        return [4 * sum(token % 2 for token in row) / len(row) for row in rows]

    shape, gpu = SHAPES[args.shape], torch.cuda.is_available()
    config = PPOConfig(
        output_dir=folder, mini_batch_size=shape.minibatch, generation_batch_size=shape.rollout,
        num_iterations=EPOCHS, max_completion_length=shape.length, kl_target=None, bf16=args.bf16,
        max_steps=args.episodes // shape.minibatch * EPOCHS, activation_checkpointing=args.worker == "old",
        kl_limit=None, use_cpu=not gpu, dataloader_pin_memory=gpu, seed=args.seed, **shape.common,
    )  # fmt: skip
    rewards = [reward, *([deberta_reward(args, tokenizer)] if args.reward == "deberta" else [])]
    return PPOTrainer(
        base, rewards, config, train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer,
        peft_config=LoraConfig(**shape.lora),
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

    tokenizer, prompts = tokenizer_and_prompts(args, 1024)
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
        critic = with_lora(critic, SHAPES[args.shape].lora)
    work, gpu = SHAPES[args.shape], torch.cuda.is_available()
    config = PPOConfig(
        output_dir=folder, per_device_train_batch_size=work.rollout, num_mini_batches=work.rollout // work.minibatch,
        gradient_accumulation_steps=1, num_ppo_epochs=EPOCHS, response_length=work.length,
        total_episodes=args.episodes, local_rollout_forward_batch_size=work.rollout, num_sample_generations=0,
        stop_token="eos", bf16=args.bf16, use_cpu=not gpu, seed=args.seed, **work.common,
    )  # fmt: skip
    return PPOTrainer(
        args=config, processing_class=tokenizer, model=base, ref_model=None, reward_model=Reward(), value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": [tokenizer(p)["input_ids"] for p in prompts]}),
        peft_config=LoraConfig(**work.lora),
    )  # fmt: skip


def with_lora(critic, settings):
    """TRL's critic with a LoRA like the policy's, its head trained too: a choice in TRL's favor."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    critic = inject_adapter_in_model(LoraConfig(**settings | {"task_type": "SEQ_CLS"}), critic)
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

    gpu = torch.cuda.is_available()
    args.bf16 = gpu or args.worker.endswith("-bfloat16")
    if args.worker == "rsoups" and args.shape == "smollm2":  # the embedded policy's configs say float32
        from rsoups.training.ppo_config import has_bf16

        args.bf16 = has_bf16()
    base = base_model(args)
    before, _ = shapes.memory()
    with tempfile.TemporaryDirectory() as folder:
        trainer = (trl_trainer if args.worker.startswith("trl") else rsoups_trainer)(args, base, folder)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    rewards = [row[key] for row in trainer.state.log_history for key in ("reward", "objective/scores") if key in row]
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
                "rewards": rewards,
                "bfloat16": args.bf16,
                "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl, peft)},
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
            }
        )
    )


# --- all of them -----------------------------------------------------------------------------------------------------


def command_of(name, args):
    """Command and environment of one measurement."""
    python = ROOT / ".venv-oracle/bin/python" if name.startswith("trl") else sys.executable
    flags = [
        f"--{key}={value}"
        for key, value in vars(args).items()
        if value is not None and key not in ("rounds", "trainers")
    ]
    folder = args.old if name == "old" else ROOT
    return [python, __file__, *flags, "--worker", name], os.environ | {"PYTHONPATH": str(folder)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="embedded")
    parser.add_argument("--base", help="folder of a model of that shape, with its tokenizer; random weights if unset")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--reward", choices=("tokens", "deberta"), default="tokens")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, help="trl and rsoups if unset")
    parser.add_argument("--old", help="folder of another commit of rsoups, for the trainer `old`")
    parser.add_argument("--episodes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", choices=TRAINERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return measure(args)

    names = args.trainers or ["trl", "rsoups"]
    if "old" in names and not args.old:
        parser.error("the trainer `old` needs --old FOLDER")
    found = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names if number % 2 else reversed(names):
            command, environment = command_of(name, args)
            run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if run.returncode:
                sys.exit(f"{name} failed:\n{run.stderr[-3000:]}")
            found[name].append(json.loads(run.stdout.strip().splitlines()[-1]))
            print(
                f"round {number + 1}: {name:7}",
                {k: v for k, v in found[name][-1].items() if k not in ("versions", "rewards")},
                flush=True,
            )
    figures = ("episodes_per_second", "peak_memory_beyond_base_mb", "reward_last_quarter", "kl_last_quarter")
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in figures} for name, runs in found.items()
    }
    result = {"command": " ".join(sys.argv), "cores": os.cpu_count(), "medians": medians, "runs": found}
    for other in names:
        if "rsoups" in names and other != "rsoups":
            ratio = {key: medians["rsoups"][key] / medians[other][key] for key in figures[:2]}
            result.setdefault("ratio", {})[f"rsoups to {other}"] = ratio
    tag = "" if args.trainers is None else "-" + "-".join(names)
    out = ROOT / "benchmarks/results" / f"ppo-{args.shape}{'' if args.reward == 'tokens' else '-deberta'}{tag}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("medians", "ratio") if key in result}, indent=2), f"\n{out}")


if __name__ == "__main__":
    main()
