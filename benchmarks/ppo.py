"""rsoups.PPOTrainer beside TRL 1.12's PPOTrainer: the same work in turn, in one run.

    make bench-ppo                                                  # the embedded policy, two CPU cores, a few minutes
    python benchmarks/ppo.py --shape llama7b --episodes 512         # a CUDA GPU: LLaMA-7b's shape, random weights, bf16
    python benchmarks/ppo.py --shape llama7b --layers 2 --episodes 64 --rounds 1                     # a dry run of that
    python benchmarks/ppo.py --shape smollm2 --base FOLDER --episodes 64 --rounds 1                  # SmolLM2-135M on a CPU
    git worktree add OLD COMMIT && python benchmarks/ppo.py ... --old OLD --trainers rsoups old      # beside an older commit

Same base, prompts, LoRA, batch (64 responses, 2 PPO epochs, minibatches of 32; of SmolLM2 32 and 16), response length,
temperature, KL coefficient and reward: the share of a sequence's tokens with odd ids, times 4,
cheap for both so that the trainers are what is measured; --reward deberta puts a DeBERTa-v3-large of random weights
beside it (ours only: TRL 1.12 wants a reward on the policy's tokenizer). TRL's critic is a second model, as it asks.
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
import resource
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
}


# --- one measurement -------------------------------------------------------------------------------------------------


def base_model(args):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    dtype = torch.bfloat16 if args.bf16 and args.shape != "embedded" else torch.float32  # what is published, or float32
    folder = args.base or (ROOT / "rsoups/assets/tiny-llama" if args.shape == "embedded" else None)
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    torch.manual_seed(0)
    shape = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if args.shape == "smollm2":
        shape |= {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
                  "vocab_size": 49_152, "tie_word_embeddings": True, "rope_theta": 1e5}  # fmt: skip
    config = LlamaConfig(num_hidden_layers=args.layers or {"smollm2": 30, "llama7b": 32}[args.shape], **shape)
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


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


def memory():
    """Bytes now, and at the peak so far."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
    rewards = [reward, *([deberta_reward()] if args.reward == "deberta" else [])]
    return PPOTrainer(
        base, rewards, config, train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer,
        peft_config=LoraConfig(**shape.lora),
    )  # fmt: skip


def deberta_reward():
    """What an OpenAssistant reward costs: a DeBERTa-v3-large of random weights, ids drawn for the tokenizer's."""
    import torch
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(
        vocab_size=128_100, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], position_biased_input=False, max_relative_positions=-1, type_vocab_size=0, num_labels=1,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DebertaV2ForSequenceClassification(config).to(device).eval()

    def reward(prompts, completions, completion_ids, **columns):
        ids = torch.randint(5, 128_000, (len(prompts), 64), device=device)
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return [0.0 * score for score in model(input_ids=ids).logits[:, 0].tolist()]

    return reward


def trl_trainer(args, base, folder):
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import LlamaForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer, prompts = tokenizer_and_prompts(args, 1024)

    class Backbone(torch.nn.Module):
        def forward(self, input_ids, attention_mask, **kwargs):
            # (B, T, 1): running share of favored tokens; TRL reads it at a response's last token.
            good = ((input_ids % 2 == 1) & attention_mask.bool()).float().cumsum(1)
            share = 4 * good / attention_mask.cumsum(1).clamp(min=1)
            return type("Output", (), {"hidden_states": [share.unsqueeze(-1)]})()

    class Reward(torch.nn.Module):
        base_model_prefix = "backbone"

        def __init__(self):
            super().__init__()
            self.backbone, self.score = Backbone(), torch.nn.Identity()

    shape = copy.deepcopy(base.config)
    shape.num_labels = 1
    critic = LlamaForSequenceClassification(shape).to(base.dtype)
    critic.model.load_state_dict(base.model.state_dict())
    torch.nn.init.zeros_(critic.score.weight)
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


def measure(args):
    import peft
    import torch
    import transformers
    import trl

    gpu = torch.cuda.is_available()
    args.bf16 = gpu or args.worker.endswith("-bfloat16")
    if args.worker == "rsoups" and args.shape == "smollm2":  # the embedded policy's configs say float32
        from rsoups.training.ppo_config import has_bf16

        args.bf16 = has_bf16()
    base = base_model(args)
    before, _ = memory()
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
                "peak_memory_beyond_base_mb": (memory()[1] - before) / 2**20,
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

    names = args.trainers or (["rsoups"] if args.reward == "deberta" else ["trl", "rsoups"])
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
