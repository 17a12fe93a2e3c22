"""Held-out figures of the embedded models.

    python recipes/embedded/evaluate.py policy COMMONGEN rsoups/tiny-llama --out figures.json
    python recipes/embedded/evaluate.py people COMMONGEN --out figures.json
    python recipes/embedded/evaluate.py calibrate naturalness coverage rating --policy rsoups/tiny-llama

`policy`: perplexity of the human references, concept coverage, BLEU-4, ROUGE-L and CIDEr (greedy, on the 993 dev sets) and
20 unpicked samples. `people`: how often one person's rating orders two sentences as the mean of the others does, on the
pairs that the rating reward is tested on. `calibrate`: mean and deviation of each reward over the policy's samples for
the demo's train prompts, for the cards' `mean` and `std`.
"""

import argparse
import json
import math
import random
from collections import defaultdict
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from prepare import tidy_sentence

from rewards import covered, prompt, samples
from rsoups import load_reward
from rsoups.bases.load import load_base, load_tokenizer
from rsoups.common.files import read_jsonl
from rsoups.data.datasets import load_rows
from rsoups.data.prompts import first_sentence
from rsoups.data.tasks import TASKS
from rsoups.generation.respond import respond


@torch.inference_mode()
def perplexity(model: Any, tokenizer: Any, rows: list[dict], batch: int = 128) -> float:
    """exp of the mean negative log-likelihood of the references' tokens, end token included."""
    pairs = [(prompt(row["concepts"]), tidy_sentence(s)) for row in rows for s in row["sentences"]]
    total, tokens = 0.0, 0
    for start in range(0, len(pairs), batch):
        prompts = [tokenizer(p)["input_ids"] for p, _ in pairs[start : start + batch]]
        responses = [
            tokenizer(r, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            for _, r in pairs[start : start + batch]
        ]
        width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
            ids[i, : len(p) + len(r)] = torch.tensor(p + r)
            labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
        logits = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        ).item()
        tokens += int((labels[:, 1:] != -100).sum())
    return math.exp(total / tokens)


def against_references(responses: list[str], references: list[list[str]]) -> dict[str, float]:
    """Corpus BLEU-4 (sacrebleu), ROUGE-L F1 (best reference, rouge-score) and CIDEr (pycocoevalcap), all on lower case."""
    import sacrebleu
    from pycocoevalcap.cider.cider import Cider
    from rouge_score.rouge_scorer import RougeScorer

    lower = [r.lower() for r in responses]
    refs = [[r.lower() for r in group] for group in references]
    widest = max(map(len, refs))
    streams = [[group[i] if i < len(group) else None for group in refs] for i in range(widest)]
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rouge = [scorer.score_multi(group, r)["rougeL"].fmeasure for r, group in zip(lower, refs, strict=True)]
    words = [" ".join(r.replace(".", " ").replace(",", " ").split()) for r in lower]
    cleaned = [[" ".join(r.replace(".", " ").replace(",", " ").split()) for r in group] for group in refs]
    cider, _ = Cider().compute_score(dict(enumerate(cleaned)), {i: [w] for i, w in enumerate(words)})
    return {
        "BLEU-4": sacrebleu.corpus_bleu(lower, streams).score,  # type: ignore[arg-type]  # None is a missing reference
        "ROUGE-L": 100 * mean(rouge),
        "CIDEr": 10 * float(cider),
    }


def policy_figures(data: Path, name: str) -> dict:
    tokenizer, model = load_tokenizer(name), load_base(name, device="cpu").eval()
    rows = read_jsonl(data / "dev.jsonl.gz")
    prompts = [prompt(row["concepts"]) for row in rows]
    ids = respond(model, tokenizer, prompts, temperature=0, max_new_tokens=32)
    written = [first_sentence(tokenizer.decode(row, skip_special_tokens=True)) for row in ids]
    torch.manual_seed(0)
    drawn = samples(name, prompts)
    shown = random.Random(0).sample(range(len(rows)), k=20)
    return {
        "perplexity": perplexity(model, tokenizer, rows),
        "coverage_greedy": mean(covered(r["concepts"], w) for r, w in zip(rows, written, strict=True)),
        "coverage_sampled": mean(covered(r["concepts"], w) for r, w in zip(rows, drawn, strict=True)),
        **against_references(written, [row["sentences"] for row in rows]),
        "samples": [{"concepts": rows[i]["concepts"], "greedy": written[i], "sampled": drawn[i]} for i in shown],
    }


def people_figures(data: Path) -> dict:
    """Leave one rater out: does that one's order of two candidates agree with the mean of the others'?"""
    ratings, groups = defaultdict(list), defaultdict(set)
    for row in read_jsonl(data / "ratings_dev.jsonl.gz"):
        ratings[row["candidate"]].append(row["scores"])
        groups[row["reference"]].add(row["candidate"])
    agree = []
    for group in {frozenset(g) for g in groups.values()}:
        for a in sorted(group):
            for b in sorted(group - {a}):
                if mean(s for r in ratings[a] for s in r) - mean(s for r in ratings[b] for s in r) < 0.5:
                    continue
                for (i, first), (j, second) in (
                    (x, y) for x in all_ratings(ratings[a]) for y in all_ratings(ratings[b])
                ):
                    rest = mean(others(ratings[a], i)) - mean(others(ratings[b], j))
                    if rest != 0:
                        agree.append(0.5 if first == second else float((first > second) == (rest > 0)))
    return {"people_agreement": mean(agree), "comparisons": len(agree)}


def all_ratings(rated: list[list[int]]) -> list[tuple[int, int]]:
    return list(enumerate(s for scores in rated for s in scores))


def others(rated: list[list[int]], left_out: int) -> list[int]:
    return [s for i, s in all_ratings(rated) if i != left_out]


def calibrate(names: list[str], policy: str) -> dict:
    rows = load_rows(TASKS["concepts"], None, "train", limit=1024)
    prompts = [row["prompt"] for row in rows]
    torch.manual_seed(0)
    drawn = samples(policy, prompts)
    out = {}
    for name in names:
        reward = load_reward(name)
        raw = [score * reward.card.std + reward.card.mean for score in reward(prompts, drawn)]
        out[name] = {"mean": round(mean(raw), 3), "std": round(pstdev(raw), 3)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("policy", "people", "calibrate"))
    parser.add_argument("rest", nargs="+", help="COMMONGEN [MODEL], or reward names")
    parser.add_argument("--policy", default="rsoups/tiny-llama")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.what == "policy":
        figures = policy_figures(Path(args.rest[0]), args.rest[1])
    elif args.what == "people":
        figures = people_figures(Path(args.rest[0]))
    else:
        figures = calibrate(args.rest, args.policy)
    text = json.dumps(figures, indent=2, ensure_ascii=False)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
