"""Scoring 64 responses of mixed length: rsoups.Reward against one at a time, as the paper's pipeline does.

    python benchmarks/scoring.py                          # two layers of DeBERTa-v3-large's shape, a minute or two on a CPU
    python benchmarks/scoring.py --layers 24              # all of it, as on a GPU, where that is the default
    python benchmarks/scoring.py --dtype bfloat16         # on a GPU; scores are then equal to the precision's rounding

Random weights, the embedded policy's tokenizer. One at a time is transformers' text-classification pipeline with batch size
1 and raw logits, which the paper's code used. Two mixes of lengths: `assistant` has questions of 5 to 100 characters and
responses of 16 to 32 tokens, the paper's; `long` has questions of up to 100 tokens and responses of 8 to 256.

Each way runs in turn, the order alternating; medians and their ratio are written to benchmarks/results/scoring.json. Scores
must agree to 1e-5 in float32.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    pipeline,
)

import rsoups
from rsoups.common.files import read_jsonl

ROOT = Path(__file__).parent.parent
RESPONSES = 64
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}


def deberta_v3_large(folder, layers):
    """The shape with random weights and a tokenizer of pairs, saved."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "rsoups/assets/naturalness")
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=128_100, hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=4096,
        relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], position_biased_input=False, max_relative_positions=-1, type_vocab_size=0, num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def samples(mix, seed):
    """Questions and responses made of the embedded prompts' words."""
    rows = read_jsonl(ROOT / "rsoups/assets/concepts/train.jsonl")
    words = [word for row in rows for word in row["concepts"]]
    draw = random.Random(seed)
    text = lambda least, most: " ".join(draw.choices(words, k=draw.randint(least, most)))  # noqa: E731
    if mix == "long":
        return [text(1, 100) for _ in range(RESPONSES)], [text(8, 256) for _ in range(RESPONSES)]
    return [text(2, 20)[: draw.randint(5, 100)].strip() for _ in range(RESPONSES)], [
        text(16, 32) for _ in range(RESPONSES)
    ]


def timed(score, device):
    started = time.perf_counter()
    scores = score()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, scores


def compared(reward, one_by_one, mix, rounds, dtype, device):
    questions, responses = samples(mix, seed=0)
    pairs = [{"text": q, "text_pair": r} for q, r in zip(questions, responses, strict=True)]
    ways = {
        "one by one": lambda: [one_by_one(pair)["score"] for pair in pairs],
        "rsoups": lambda: reward(questions, responses),
    }
    seconds = {name: [] for name in ways}
    scores = {name: timed(score, device)[1] for name, score in ways.items()}  # warm
    difference = max(abs(a - b) for a, b in zip(*scores.values(), strict=True))
    spread = max(scores["rsoups"]) - min(scores["rsoups"])
    assert difference <= TOLERANCE[dtype] and spread > 2 * difference, f"scores differ by {difference}, of {spread}"
    for number in range(rounds):
        for name in ways if number % 2 else reversed(ways):
            seconds[name].append(timed(ways[name], device)[0])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = [len(row["input_ids"]) for row in reward.encode(questions, responses)]
    return {
        "tokens": {"mean": statistics.mean(tokens), "least": min(tokens), "most": max(tokens)},
        "seconds": seconds,
        "medians": medians,
        "ratio": medians["one by one"] / medians["rsoups"],
        "largest_difference": difference,
        "spread_of_scores": spread,
    }


def main():
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24 if gpu else 2, help="DeBERTa-v3-large has 24")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mixes", nargs="+", choices=("assistant", "long"), default=["assistant", "long"])
    args = parser.parse_args()
    device = "cuda" if gpu else "cpu"

    with tempfile.TemporaryDirectory() as folder:
        model = deberta_v3_large(folder, args.layers)
        reward = rsoups.Reward(rsoups.RewardCard("deberta", model=model, dtype=args.dtype), device)
        one_by_one = pipeline(
            "text-classification",
            model=AutoModelForSequenceClassification.from_pretrained(model, dtype=getattr(torch, args.dtype)),
            tokenizer=AutoTokenizer.from_pretrained(model), device=device, function_to_apply="none", batch_size=1,
        )  # fmt: skip
        found = {mix: compared(reward, one_by_one, mix, args.rounds, args.dtype, device) for mix in args.mixes}
    result = {
        "command": " ".join(sys.argv),
        "layers": args.layers,
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, rsoups)},
        "mixes": found,
    }
    out = ROOT / "benchmarks/results/scoring.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    for mix, figures in found.items():
        one, ours = figures["medians"].values()
        print(f"{mix}: one by one {one:.2f} s, rsoups {ours:.2f} s: {figures['ratio']:.2f} times as fast")
    print(out)


if __name__ == "__main__":
    main()
