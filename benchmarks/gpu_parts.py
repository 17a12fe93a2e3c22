"""The parts of gpu.py. Each gets a size and a function that notes figures; see there for how they are run."""

import os
import platform
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gpu_training
import peft
import ppo
import shapes
import sweep as sweeps
import torch
import transformers
import trl
from gpu_training import Size

import rsoups
from rsoups.data.datasets import load_rows
from rsoups.data.tasks import TASKS

# Peak of dense bfloat16 matrix products by the makers' data sheets, FLOP/s, by a part of the card's name.
_PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


def machine() -> dict[str, Any]:
    """Device and versions, for the results."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "devices": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, rsoups)}
        | {"python": platform.python_version()},
    }


# --- PPO ---------------------------------------------------------------------------------------------------------------


class Spans:
    """Seconds inside functions, by name, the GPU's work included."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, float, float]] = []

    @contextmanager
    def of(self, functions: list[tuple[Any, str, str]]) -> Iterator[None]:
        """A context that times functions, each an owner, an attribute and the name of its time."""
        patches = [patch.object(o, name, self._timed(label, getattr(o, name))) for o, name, label in functions]
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()

    def _timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            shapes.synchronize()
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                shapes.synchronize()
                self.spans.append((label, begun, time.perf_counter()))

        return timed

    def starts(self, label: str) -> list[float]:
        return sorted(begun for name, begun, _ in self.spans if name == label)

    def seconds(self, label: str, since: float) -> float:
        return sum(end - begun for name, begun, end in self.spans if name == label and begun >= since)


def ppo_ours(size: Size, note: Any) -> None:
    """PPO by rsoups: speed, memory, where the time goes, and the share of the card's peak."""
    functions = {
        "_generate_single_turn": "generation",
        "_calculate_rewards": "scoring",
        "_generate_and_score_completions": "rollout",
    }
    measured_ppo(size, note, "rsoups", lambda trainer: [(trainer, *pair) for pair in functions.items()])


def ppo_trl(size: Size, note: Any) -> None:
    """The same by TRL 1.12, whose critic has a LoRA too. Log-probabilities, values and update are one figure."""
    if not trl.__version__.startswith("1.12"):
        return note(skipped=f"TRL 1.12 is not on the path (TRL {trl.__version__} is): pass --trl FOLDER")
    from trl.experimental.ppo import ppo_trainer

    def reward(trainer: Any) -> list[tuple[Any, str, str]]:
        scoring = trainer.reward_model.backbone
        return [(ppo_trainer, "batch_generation", "generation"), (scoring, "forward", "scoring")]

    measured_ppo(size, note, "trl", reward)


def measured_ppo(size: Size, note: Any, name: str, functions: Callable[[Any], list[tuple[Any, str, str]]]) -> None:
    work = ppo.SHAPES[size.shape]
    args = gpu_training.ppo_arguments(size, name, "deberta", size.rollouts * work.rollout)
    base = shapes.base_model(size.shape)
    weights = sum(module.weight.numel() for module in base.modules() if isinstance(module, torch.nn.Linear))
    before, _ = shapes.memory()
    with tempfile.TemporaryDirectory() as folder:
        trainer = {"rsoups": ppo.rsoups_trainer, "trl": ppo.trl_trainer}[name](args, base, folder)
        note(critic_mb=_critic_mb(trainer, name), made_mb=(shapes.memory()[0] - before) / 2**20)
        spans = Spans()
        with spans.of(functions(trainer)):
            trainer.train()
            shapes.synchronize()
        ended = time.perf_counter()

    timed = size.rollouts - 1  # rollouts; the first one is for warming up
    since = spans.starts("generation")[-timed]
    seconds = ended - since
    episodes = timed * work.rollout
    parts = {label: spans.seconds(label, since) for label in ("generation", "scoring", "rollout")}
    if spans.starts("rollout"):  # what is left of a rollout: log-probabilities and values
        begun = spans.starts("rollout")[-timed]
        parts["rollout"] = spans.seconds("rollout", begun) - parts["generation"] - parts["scoring"]
    parts["update"] = seconds - sum(parts.values())
    key = "reward" if name == "rsoups" else "objective/scores"
    rewards = [row[key] for row in trainer.state.log_history if key in row]
    note(
        episodes_per_second=episodes / seconds, tokens_per_second=episodes * work.length / seconds,
        peak_memory_beyond_base_mb=(shapes.memory()[1] - before) / 2**20, base_mb=before / 2**20,
        share_of_time={label: value / seconds for label, value in parts.items()}, rewards=rewards,
    )  # fmt: skip
    if name == "rsoups":
        note(model_flops_utilization=_utilization(args, weights, episodes, parts, size.matrix))


def _critic_mb(trainer: Any, name: str) -> float:
    """Memory of the critic: its numbers; of those that are trained also a gradient and Adam's two moments."""
    critic = trainer._value_head if name == "rsoups" else trainer.value_model
    return sum(p.nbytes * (4 if p.requires_grad else 1) for p in critic.parameters()) / 2**20


def _utilization(args: Namespace, weights: int, episodes: int, seconds: dict[str, float], width: int) -> dict[str, Any]:
    """FLOP/s of generation and update that the model needs, beside the card's peak.

    A token needs two operations for each weight of a linear layer in a forward pass, and two more in a backward pass, since
    the base's weights get no gradients. Attention and adapters are left out.
    """
    tokenizer, prompts = ppo.tokenizer_and_prompts(args, 256)
    prompt = statistics.mean(len(tokenizer(text)["input_ids"]) for text in prompts)
    tokens = episodes * (prompt + ppo.SHAPES[args.shape].length)
    reached = _product(width)
    peak = next(
        (value for name, value in _PEAKS.items() if torch.cuda.is_available() and name in torch.cuda.get_device_name()),
        None,
    )
    found: dict[str, Any] = {"peak": peak, "product of large matrices": reached}
    for name, flops in (("generation", 2 * weights * tokens), ("update", 4 * weights * tokens * ppo.EPOCHS)):
        found[name] = {"flops": flops / seconds[name], "of a product's": flops / seconds[name] / reached}
        if peak:
            found[name]["of the peak"] = flops / seconds[name] / peak
    return found


def _product(width: int) -> float:
    """FLOP/s of a product of two square matrices in bfloat16."""
    a, b = (torch.randn(width, width, device=shapes.DEVICE, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        shapes.synchronize()
        begun = time.perf_counter()
        a @ b
        shapes.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * width**3 / best


# --- sweeps ------------------------------------------------------------------------------------------------------------


def sweep(size: Size, note: Any) -> None:
    """A sweep of 11 λ, and one of a single λ, beside PEFT's way and the paper's."""
    rows = load_rows(TASKS["concepts"], None, "test")
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[: size.prompts]
    rewards = {name: rsoups.load_reward(name, shapes.DEVICE) for name in ("naturalness", "coverage")}
    load = partial(shapes.base_model, size.shape)
    base = load()
    with tempfile.TemporaryDirectory() as folder:
        two = sweeps.write_adapters(base, Path(folder), 2)
        sweeps.by_rsoups_of_one(base, two, rewards, prompts[:2])  # warms up
        ours, texts = sweeps.by_rsoups(base, two, rewards, prompts)
        one = sweeps.by_rsoups_of_one(base, two, rewards, prompts)
        note.add({"prompts": len(prompts), "rsoups": ours, "rsoups, one λ": one, "11 λ / one λ": ours / one})
        theirs, others = sweeps.by_peft(base, two, rewards, prompts)
        same = sum(texts[key] == text for key, text in others.items())
        note.add({"peft": theirs, "peft / rsoups": theirs / ours, "same texts": f"{same} of {len(others)}"})
        note.add({"logits, apart from PEFT's": sweeps.apart(base, two, prompts[:8])})
        del base
        lambdas, count = size.papers
        paper = sweeps.by_paper(load, two, rewards, prompts, count, lambdas)
        note.add({"paper": paper, "paper / rsoups": paper / ours})


def decode(size: Size, note: Any) -> None:
    """A decode step of live soups of 2 and 4 adapters over one of a single PEFT adapter, in milliseconds."""
    base = shapes.base_model(size.shape)
    with tempfile.TemporaryDirectory() as folder:
        four = sweeps.write_adapters(base, Path(folder), 4)
        for count in size.rows:
            found = sweeps.steps(base, four, count, rounds=2)
            ratios = {f"{name} / peft": found[name] / found["peft"] for name in ("live 2", "live 4")}
            note.add({f"{count} rows": found | ratios})


PARTS: dict[str, Callable[[Size, Any], None]] = {
    "ppo": ppo_ours,
    "ppo_trl": ppo_trl,
    "sweep": sweep,
    "decode": decode,
    "memory": gpu_training.memory_of_configs,
    "resume": gpu_training.resume,
    "processes": gpu_training.processes,
    "qlora": gpu_training.qlora,
}
