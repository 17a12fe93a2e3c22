"""The parts of gpu.py that train: memory of the configs, resumed runs, two processes, 4-bit bases.

python gpu_training.py FOLDER SHAPE        # one of several processes, as `processes` starts it
"""

import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ppo
import shapes
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor

# Of recipes/configs/README.md: tokens of the longest prompt and response; GB in 8 bit as the config stands; GB in bfloat16 with
# the whole rollout generated at one time.
CONFIGS = {
    "assistant": (90, 16, 23), "news": (472, 20, 48), "reddit": (392, 19, 43), "stack": (232, 15, 32), "review": (54, 13, 20),
}  # fmt: skip
_QUANTIZED = ("assistant", "news")  # configs that are measured in 8 bit too
_SIZES = ("generation_batch_size", "mini_batch_size", "local_rollout_forward_batch_size")
_RESPONSE = 32
_LORA: dict[str, Any] = {"r": 16, "lora_alpha": 16, "task_type": "CAUSAL_LM"}
_CUT = 3  # the step after which a run is resumed, in the middle of a rollout


@dataclass(frozen=True)
class Size:
    """How large the parts are.

    Attributes:
        shape: Shape of the base, as in shapes.py.
        rollouts: Rollouts of PPO; the first one is not timed.
        prompts: Prompts of a sweep.
        papers: Number of λ, and of prompts at each, that the paper's way is measured on.
        rows: Rows of the decode step.
        matrix: Width of the matrices whose product shows what the card reaches.
        shrink: Divisor of the lengths and batches of the memory's table.
    """

    shape: str
    rollouts: int
    prompts: int
    papers: tuple[int, int]
    rows: tuple[int, ...]
    matrix: int
    shrink: int

    @property
    def tiny(self) -> bool:
        return self.shape == "tiny"


FULL = Size("llama7b", rollouts=4, prompts=64, papers=(2, 2), rows=(1, 8, 64), matrix=8_192, shrink=1)
TINY = Size("tiny", rollouts=2, prompts=2, papers=(1, 1), rows=(64,), matrix=128, shrink=16)


def no_bitsandbytes() -> str | None:
    """Why nothing can be quantized."""
    return None if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed"


def ppo_arguments(size: Size, worker: str, reward: str, episodes: int) -> Namespace:
    """Arguments of ppo.py for one measurement in this process."""
    return Namespace(
        worker=worker, shape=size.shape, base=None, layers=None, bf16=torch.cuda.is_available(), reward=reward,
        episodes=episodes, seed=0,
    )  # fmt: skip


# --- memory ------------------------------------------------------------------------------------------------------------


def memory_of_configs(size: Size, note: Any) -> None:
    """The memory of a rollout and an optimizer step of each config of the paper, in GB, beside what the plan calculates."""
    for name in CONFIGS:
        note.add({f"{name}, bf16": _memory_of(name, size, bits=16)})
    if reason := no_bitsandbytes():
        return note.add({"8 bit": reason})
    for name in _QUANTIZED:
        note.add({f"{name}, 8 bit": _memory_of(name, size, bits=8)})


def _memory_of(name: str, size: Size, bits: int) -> dict[str, Any]:
    from rsoups import PPOTrainer
    from rsoups.training.run_plan import memory as calculated_memory

    shapes.reset_peak()
    config = yaml.safe_load((shapes.ROOT / f"recipes/configs/llama7b-{name}.yaml").read_text("utf-8"))
    tokens, as_it_stands, faster = CONFIGS[name]
    sizes = {key: config[key] // size.shrink for key in _SIZES if key in config}
    sizes["mini_batch_size"] = config["mini_batch_size"]
    if bits == 16:
        sizes["local_rollout_forward_batch_size"] = sizes["generation_batch_size"]
    response = max(2, _RESPONSE // size.shrink)
    longest = max(2, (tokens - _RESPONSE) // size.shrink)

    base = shapes.base_model(size.shape)
    base = shapes.quantized(base, bits) if bits < 16 else base
    model = get_peft_model(base, LoraConfig(**_LORA, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    tokenizer = shapes.words_tokenizer(base.config.vocab_size)
    prompts = [" ".join(f"w{(i + j) % 500}" for j in range(longest)) for i in range(sizes["generation_batch_size"])]
    reward = _DebertaReward(size.tiny)
    with tempfile.TemporaryDirectory() as folder:
        args = _config(
            folder, size, max_completion_length=response, min_completion_length=response, num_iterations=1, max_steps=1,
            bf16=True, **sizes,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": prompts})
        trainer = PPOTrainer(model, [reward.score], args, train_dataset=data, processing_class=tokenizer)
        shapes.reset_peak()
        before, _ = shapes.memory()
        started = time.perf_counter()
        trainer.train()

    parts = calculated_memory(trainer.model, [reward], args, longest, on_gpu=False)
    figures = {
        "measured": shapes.memory()[1] / 1e9, "measured before": before / 1e9, "calculated": sum(parts.values()),
        "calculated parts": parts, "README, with 1 GB for CUDA": faster if bits == 16 else as_it_stands,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        figures["taken of the card"] = (whole - free) / 1e9  # with CUDA's own, and what torch keeps
    return figures


class _DebertaReward:
    """DeBERTa-v3-large's shape in float32, as the table counts it."""

    def __init__(self, tiny: bool):
        self._model = shapes.deberta_v3_large(tiny=tiny).to(shapes.DEVICE)

    def score(self, prompts: list[str], completions: list[str], completion_ids: list, **columns: Any) -> list[float]:
        longest = max(map(len, completion_ids))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in completion_ids], device=shapes.DEVICE)
        with torch.inference_mode():
            return self._model(input_ids=ids).logits[:, 0].tolist()


def _config(folder: Any, size: Size, **settings: Any) -> Any:
    """Settings that all runs here share; those of `settings` replace them."""
    from rsoups import PPOConfig

    common: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": size.tiny, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "activation_checkpointing": False, "dataloader_pin_memory": False, "kl_limit": None,
        "temperature": 1.0, "seed": 0, "bf16": False,
    }  # fmt: skip
    return PPOConfig(**(common | settings))


# --- resumed runs ------------------------------------------------------------------------------------------------------


def resume(size: Size, note: Any) -> None:
    """A run that is resumed in the middle of a rollout against a whole one, in float32 and in bfloat16.

    The same run once more shows how far two runs are apart whose kernels add in another order.
    """
    for name, bf16 in (("float32", False), ("bfloat16", True)):
        with tempfile.TemporaryDirectory() as folder:
            whole, again, resumed = (_trained(Path(folder), run, size, bf16) for run in ("whole", "again", "resumed"))
        note.add({
            name: {
                "resumed, largest difference": _apart(whole, resumed),
                "run again, largest difference": _apart(whole, again),
                "largest number": max(float(tensor.abs().max()) for key, tensor in whole.items() if "lora_B" in key),
            }
        })  # fmt: skip
    note(cuda_seed=torch.cuda.initial_seed() if torch.cuda.is_available() else None)


def _trained(folder: Path, name: str, size: Size, bf16: bool) -> dict[str, Tensor]:
    """The adapter of a run; of the run "resumed" from a checkpoint of the run "whole"."""
    trainer = _small_trainer(folder / name, size, bf16)
    trainer.train(str(folder / "whole" / f"checkpoint-{_CUT}") if name == "resumed" else None)
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        key: tensor.detach().cpu().clone()
        for key, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def _small_trainer(folder: Path, size: Size, bf16: bool) -> Any:
    """Six steps of PPO on few layers: a rollout of 16 responses, gone through twice in halves."""
    from rsoups import PPOTrainer

    base = shapes.base_model("tiny" if size.tiny else "smollm2", 2 if size.tiny else 4)
    tokenizer = shapes.words_tokenizer(base.config.vocab_size)
    prompts = [f"w{i} w{i * 7 % 50} w{i * 3 % 11}" for i in range(64)]

    def odd(prompts: list[str], completions: list[str], completion_ids: list, **columns: Any) -> list[float]:
        return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]

    args = _config(
        folder, size, generation_batch_size=16, mini_batch_size=8, num_iterations=2, max_completion_length=8,
        max_steps=2 * _CUT, learning_rate=1e-2, save_strategy="steps", save_steps=_CUT, bf16=bf16,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": prompts})
    lora = LoraConfig(**_LORA, target_modules="all-linear")
    return PPOTrainer(base, [odd], args, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def _apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def processes(size: Size, note: Any) -> None:
    """Two processes: their seeds differ, their adapters are equal, and a resumed run ends like a whole one."""
    if not size.tiny and torch.cuda.device_count() < 2:
        return note(skipped="there is one card")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1]), "WORLD_SIZE": "2"}
        server.close()
        started = [
            subprocess.Popen(
                [sys.executable, __file__, folder, "tiny" if size.tiny else "full"],
                env=env | {"RANK": rank, "LOCAL_RANK": rank},
            )
            for rank in ("0", "1")
        ]
        for process in started:
            if process.wait():
                raise SystemExit(f"a process ended with {process.returncode}")
        ranks = [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(2)]
    seeds = [rank["cuda_seed"] or rank["seed"] for rank in ranks]
    note(ranks=ranks, seeds_differ=seeds[0] != seeds[1], adapters_equal=ranks[0]["adapter"] == ranks[1]["adapter"])


def rank(folder: Path, size: Size) -> None:
    """One of several processes: trains, resumes, and writes its figures."""
    number = int(os.environ["RANK"])
    seeds: dict[str, Any] = {}

    trainer = _small_trainer(folder / "seeds", size, bf16=False)
    seeds["seed"] = torch.initial_seed()
    seeds["cuda_seed"] = torch.cuda.initial_seed() if torch.cuda.is_available() else None
    del trainer
    whole, resumed = (_trained(folder, run, size, bf16=False) for run in ("whole", "resumed"))
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in whole.values())).hexdigest()
    figures = seeds | {"adapter": digest, "resumed, largest difference": _apart(whole, resumed)}
    (folder / f"rank-{number}.json").write_text(json.dumps(figures))


# --- 4 bit ---------------------------------------------------------------------------------------------------------------


def qlora(size: Size, note: Any) -> None:
    """PPO over a base in 4 bit: speed, memory, rewards."""
    if reason := no_bitsandbytes():
        return note(skipped=reason)
    base = shapes.quantized(shapes.base_model(size.shape), bits=4)
    shapes.reset_peak()
    before, _ = shapes.memory()
    args = ppo_arguments(size, "rsoups", "tokens", 2 * ppo.SHAPES[size.shape].rollout)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = ppo.rsoups_trainer(args, base, folder)
        trainer.train()
    adapter = get_peft_model_state_dict(trainer.model, save_embedding_layers=False)
    note(
        base_mb=before / 2**20, peak_memory_beyond_base_mb=(shapes.memory()[1] - before) / 2**20,
        episodes_per_second=args.episodes / (time.perf_counter() - started),
        rewards=[row["reward"] for row in trainer.state.log_history if "reward" in row],
        finite=all(bool(tensor.isfinite().all()) for tensor in adapter.values()),
    )  # fmt: skip


if __name__ == "__main__":
    rank(Path(sys.argv[1]), TINY if sys.argv[2] == "tiny" else FULL)
