"""A sweep by rsoups beside the paper's way and PEFT's: same base, adapters, prompts, rewards, greedy decoding, in one run.

    python benchmarks/sweep.py                                      # the embedded policy, CPU cores, some minutes
    python benchmarks/sweep.py --shape smollm2 --prompts 64 --rounds 1 --measure sweep --peft_lambdas 4      # SmolLM2's shape
    python benchmarks/sweep.py --shape llama7b --rounds 1           # a CUDA GPU: LLaMA-7b's shape, random weights, bf16
    python benchmarks/sweep.py --prompts 16 --rounds 1 --paper_prompts 1 --out /tmp                  # a dry run

11 λ × 200 prompts × up to 32 tokens, two rewards:

- paper: for each λ the base is loaded and the adapters are averaged into it; prompts one at a time, each scored by itself. Of
  200 prompts `--paper_prompts` are measured, and their time is multiplied up (the loading is not).
- peft: one base, both adapters on it, `add_weighted_adapter("cat")` for each λ, batches of 64.
- rsoups: `rsoups.sweep`, which also evaluates the base, and KL and perplexity of every response; and once more without these
  two, which the others do not have.

Then the interactive case, 8 prompts at each λ; and a decode step with N adapters at one λ for each row, over a step with a
single PEFT adapter. Rounds in turn, the best of each; written to benchmarks/results/.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import shapes
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

import rsoups
from rsoups.common.assets import resolve
from rsoups.common.files import read_jsonl
from rsoups.data.datasets import load_rows
from rsoups.data.tasks import TASKS
from rsoups.generation.decoding import Decoder

DEVICE = shapes.DEVICE
TOKENS = 32
STD = 0.25  # of the random B: responses at 11 λ then differ about as often as with trained adapters
GRID = rsoups.simplex(2, 11)
BATCH = 64
MEASURED = ("sweep", "without_kl", "interactive", "one", "decode", "paper")
TOKENIZER = AutoTokenizer.from_pretrained(resolve("rsoups/tiny-llama"), padding_side="left")


def write_adapters(model: LlamaForCausalLM, folder: Path, count: int) -> dict[str, Path]:
    """Random LoRAs of rank 16 on all linear layers, so large that their responses differ."""
    out = {}
    for seed in range(count):
        lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(seed)
        peft = get_peft_model(model, lora)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=STD)
        out[f"adapter-{seed}"] = folder / f"adapter-{seed}"
        peft.save_pretrained(str(out[f"adapter-{seed}"]))
        peft.unload()
        vars(model).pop("peft_config", None)
    return out


def responses(model: Any, prompts: list[str]) -> list[str]:
    inputs = TOKENIZER(prompts, return_tensors="pt", padding=True).to(DEVICE)
    with torch.inference_mode():
        ids = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=TOKENS,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    texts = TOKENIZER.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def by_paper(
    load: Callable[[], LlamaForCausalLM],
    adapters: dict[str, Path],
    rewards: dict,
    prompts: list[str],
    measured: int,
    lambdas: int = len(GRID),
) -> float:
    """Seconds of all prompts at all λ, extrapolated from the first `measured` prompts at the first `lambdas` ones."""
    loading = answering = 0.0
    for row in GRID[:lambdas]:
        start = time.perf_counter()
        model = PeftModel.from_pretrained(load(), next(iter(adapters.values())), adapter_name="soup")
        others = [rsoups.interpolate([path]).state_dict for path in adapters.values()]
        averaged: dict[str, Any] = {
            key: sum(weight * state[key] for weight, state in zip(row, others, strict=True)) for key in others[0]
        }
        names = {name.replace(".soup.", "."): parameter for name, parameter in model.named_parameters()}
        with torch.no_grad():
            for key, tensor in averaged.items():
                names[key].copy_(tensor)
        loading += time.perf_counter() - start
        start = time.perf_counter()
        for prompt in prompts[:measured]:
            texts = responses(model.eval(), [prompt])
            for reward in rewards.values():
                reward([prompt], texts)
        answering += time.perf_counter() - start
    return (loading + answering * len(prompts) / measured) * len(GRID) / lambdas


def by_peft(
    base: LlamaForCausalLM, adapters: dict[str, Path], rewards: dict, prompts: list[str], lambdas: int = len(GRID)
) -> tuple[float, dict]:
    """Seconds at all λ, extrapolated from the first `lambdas` ones, and the texts of these."""
    start = time.perf_counter()
    (first, path), *others = adapters.items()
    model = PeftModel.from_pretrained(base, path, adapter_name=first)
    for name, path in others:
        model.load_adapter(path, adapter_name=name)
    found: dict[tuple, str] = {}
    ordered = sorted(prompts, key=len, reverse=True)
    for row in GRID[:lambdas]:
        used = [(name, weight) for name, weight in zip(adapters, row, strict=True) if weight]
        model.add_weighted_adapter([n for n, _ in used], [w for _, w in used], "soup", combination_type="cat")
        model.set_adapter("soup")
        for place in range(0, len(ordered), BATCH):
            batch = ordered[place : place + BATCH]
            texts = responses(model.eval(), batch)
            for reward in rewards.values():
                reward(batch, texts)
            found |= {(tuple(row), prompt): text for prompt, text in zip(batch, texts, strict=True)}
        model.set_adapter(first)
        model.delete_adapter("soup")
    seconds = (time.perf_counter() - start) * len(GRID) / lambdas
    model.unload()
    vars(base).pop("peft_config", None)
    return seconds, found


def by_rsoups(
    base: LlamaForCausalLM, adapters: dict[str, Path], rewards: dict, prompts: list[str], kl: bool = True
) -> tuple[float, dict]:
    unread = (
        nullcontext() if kl else patch.object(Decoder, "logps", lambda self, prompts, said: [(0.0, 0.0)] * len(said))
    )
    with tempfile.TemporaryDirectory() as folder, unread:
        out = Path(folder) / "records.jsonl"
        settings: dict[str, Any] = {"temperature": 0, "max_new_tokens": TOKENS, "progress": False, "out": out}
        start = time.perf_counter()
        rsoups.sweep(base, adapters, rewards, prompts, GRID, tokenizer=TOKENIZER, **settings)
        seconds = time.perf_counter() - start
        records = read_jsonl(out)
    return seconds, {(tuple(r["lambdas"].values()), r["prompt"]): r["response"] for r in records if r["lambdas"]}


def apart(base: LlamaForCausalLM, adapters: dict[str, Path], prompts: list[str]) -> dict[str, float]:
    """How far logits of rsoups are from PEFT's at λ = .3, .7, and for comparison the base's, relative to PEFT's (norms)."""
    inputs = TOKENIZER(prompts, return_tensors="pt", padding=True).to(DEVICE)
    read = inputs["attention_mask"].bool()

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return model(**{k: inputs[k] for k in ("input_ids", "attention_mask")}).logits[read].float()

    plain = logits(base)
    live = rsoups.LiveSoup(base, adapters)
    with live.at([0.3, 0.7]) as model:
        ours = logits(model)
    live.remove()
    (first, path), (second, other) = adapters.items()
    peft = PeftModel.from_pretrained(base, path, adapter_name=first)
    peft.load_adapter(other, adapter_name=second)
    peft.add_weighted_adapter([first, second], [0.3, 0.7], "soup", combination_type="cat")
    peft.set_adapter("soup")
    theirs = logits(peft.eval())
    peft.unload()
    vars(base).pop("peft_config", None)
    return {name: float((x - theirs).norm() / theirs.norm()) for name, x in (("rsoups", ours), ("base", plain))}


def steps(base: LlamaForCausalLM, adapters: dict[str, Path], rows: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a decode step after 32 tokens, the best of several: base, one PEFT adapter, live soups of 2 and 4."""
    ids = torch.randint(5, 1000, (rows, 32), device=DEVICE)

    def step(model: torch.nn.Module) -> float:
        cache = DynamicCache(config=base.config)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
            cache.crop(-1)
        return 1e3 * best

    def peft() -> float:
        model = PeftModel.from_pretrained(base, next(iter(adapters.values()))).eval()
        found = step(model)
        model.unload()
        vars(base).pop("peft_config", None)
        return found

    def live(count: int) -> Callable[[], float]:
        def measured() -> float:
            soup = rsoups.LiveSoup(base, dict(list(adapters.items())[:count]))
            with soup.at(torch.softmax(torch.randn(rows, count, dtype=torch.float64), dim=1).tolist()) as model:
                found = step(model)
            soup.remove()
            return found

        return measured

    cases = {"base": lambda: step(base), "peft": peft, "live 2": live(2), "live 4": live(4)}
    best = dict.fromkeys(cases, float("inf"))
    with torch.inference_mode():
        for _ in range(rounds):
            best = {name: min(best[name], measure()) for name, measure in cases.items()}
    return best


def by_rsoups_of_one(base: LlamaForCausalLM, adapters: dict[str, Path], rewards: dict, prompts: list[str]) -> float:
    """Seconds of a sweep of one λ."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "records.jsonl"
        settings: dict[str, Any] = {"temperature": 0, "max_new_tokens": TOKENS, "progress": False, "out": out}
        start = time.perf_counter()
        rsoups.sweep(base, adapters, rewards, prompts, [[0.5, 0.5]], tokenizer=TOKENIZER, **settings)
        return time.perf_counter() - start


def compared(
    base: LlamaForCausalLM, adapters: dict[str, Path], rewards: dict, prompts: list[str], args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of a sweep by PEFT and by rsoups, the best of some rounds in turn, their ratios, and how many texts are equal."""
    best: dict[str, float] = {}

    def keep(name: str, seconds: float) -> None:
        best[name] = min(best.get(name, seconds), seconds)

    for _ in range(args.rounds):
        seconds, by = by_peft(base, adapters, rewards, prompts, args.peft_lambdas)
        keep("peft", seconds)
        seconds, ours = by_rsoups(base, adapters, rewards, prompts)
        keep("rsoups", seconds)
        if "without_kl" in args.measure:
            keep("rsoups without KL", by_rsoups(base, adapters, rewards, prompts, kl=False)[0])

    same = sum(ours[key] == text for key, text in by.items())
    # In bfloat16 rounding decides between tokens of much the same logits, and random weights have many of these.
    if base.dtype == torch.float32 and same < 0.97 * len(by):
        raise SystemExit(f"only {same} of {len(by)} texts are the same")
    return {
        **best,
        **{f"peft / {name}": best["peft"] / best[name] for name in best if name != "peft"},
        "same texts": f"{same} of {len(by)}",
        "different texts": len({(prompt, text) for (_, prompt), text in ours.items()}),
    }


def measured(args: argparse.Namespace, prompts: list[str], rewards: dict, folder: Path) -> dict[str, Any]:
    """The figures that were asked for."""
    load = partial(shapes.base_model, args.shape, args.layers)
    base = load()
    four = write_adapters(base, folder, 4 if "decode" in args.measure else 2)
    two = dict(list(four.items())[:2])
    results: dict[str, Any] = {"logits, apart from PEFT's": apart(base, two, prompts[:8])}
    far = results["logits, apart from PEFT's"]["rsoups"]
    if far > (1e-5 if base.dtype == torch.float32 else 0.02):
        raise SystemExit(f"logits are {far} from PEFT's")

    if "sweep" in args.measure:
        results["sweep"] = compared(base, two, rewards, prompts, args)
    if "interactive" in args.measure:
        results["interactive"] = compared(base, two, rewards, prompts[:8], args)
    if "one" in args.measure:
        one = min(by_rsoups_of_one(base, two, rewards, prompts) for _ in range(args.rounds))
        results["sweep"] |= {"rsoups, one λ": one, "11 λ / one λ": results["sweep"]["rsoups"] / one}
    if "decode" in args.measure:
        results["decode step, ms"] = {}
        for count in (1, 8, 64):
            found = steps(base, four, count, args.rounds)
            ratios = {f"{name} / peft": found[name] / found["peft"] for name in ("live 2", "live 4")}
            results["decode step, ms"][f"{count} rows"] = found | ratios
    del base
    if "paper" in args.measure:
        paper = by_paper(load, two, rewards, prompts, args.paper_prompts)
        results["sweep"] |= {"paper": paper, "paper / rsoups": paper / results["sweep"]["rsoups"]}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="embedded", choices=shapes.SHAPES)
    parser.add_argument("--layers", type=int, help="number of layers, if not the shape's own")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--paper_prompts", type=int, default=4, help="of those, how many the paper's way answers")
    parser.add_argument("--peft_lambdas", type=int, default=len(GRID), help="of the 11, how many PEFT's way answers at")
    parser.add_argument("--measure", nargs="+", choices=MEASURED, default=MEASURED, help="one and paper need the sweep")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rows = load_rows(TASKS["concepts"], None, "test")
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[: args.prompts]
    rewards = {name: rsoups.load_reward(name, DEVICE) for name in ("naturalness", "coverage")}
    results: dict = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    results |= {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", "prompts": len(prompts)}
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        results |= measured(args, prompts, rewards, Path(folder))
    args.out.mkdir(exist_ok=True)
    (args.out / f"sweep-{args.shape}.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    main()
