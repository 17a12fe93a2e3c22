"""Compose the demo's prompts: concept sets of our own making, for PPO (train) and for evaluation (test).

    python recipes/embedded/prompts.py rsoups/assets/concepts [--exclude COMMONGEN]

Each set is drawn from the small grammar below: who does what to which thing, where, with what beside it. Actions are
split between train and test, so that no test prompt repeats a train prompt's verb and object. With `--exclude`, sets
that occur in a data folder's rows are left out, so that PPO never sees the prompts of the fine-tuning.
"""

import argparse
import json
import random
from pathlib import Path

from rsoups.common.files import read_jsonl

PEOPLE = """
    man woman boy girl child kid dog cat player team couple family farmer chef artist teacher student soldier
    worker dancer crowd athlete musician singer baby mother father tourist fisherman horse police doctor group
    friend
""".split()
ACTIONS = (
    """
    throw ball, catch frisbee, ride bike, play guitar, read book, wash car, cook meal, paint wall, climb mountain,
    kick ball, eat pizza, drink coffee, cut hair, carry bag, open door, hold umbrella, watch movie, feed duck,
    ride horse, drive car, drive truck, walk dog, brush teeth, cut wood, sit chair, jump fence, swim pool, sing
    song, play drum, hit ball, hold baby, push cart, pull rope, catch fish, cook egg, wear hat, wear dress, take
    picture, write letter, sell fruit, pick apple, plant tree, row boat, sail boat, fly kite, build house, fix
    roof, ride wave, surf wave, shovel snow, ski slope, skate ice, blow candle, cut cake, pour water, drink beer,
    peel potato, chop onion, mix flour, bake bread, clean window, sweep floor, wash dish, iron shirt, sew dress,
    knit scarf, draw picture, paint picture, hang clothes, fold paper, ring bell, play piano, play violin, shoot
    arrow, lift weight, run race, cross street, wait bus, board train, ride train, climb ladder, climb tree, chase
    ball, chase cat, eat grass, eat apple, dig hole, pet cat, hug friend, kiss baby, hold hand, hold flag, wave
    flag, light fire, watch game, swing bat, serve food, carry box, load truck, read newspaper, use laptop, talk
    phone, take selfie, wrap gift, open present, roll dough, feed horse, milk cow
""".strip()
    .replace("\n   ", "")
    .split(", ")
)
PLACES = """
    park beach street kitchen field river lake garden room house mountain snow road table yard city stage school
    store forest water grass stadium track bridge market floor wall sand rock sun hill farm bed couch gym
""".split()
EXTRAS = """
    hat shirt music crowd sunglasses smile rain night tree table dog knife hand bag jacket boot glass camera
""".split()
SIZES = {3: 0.5, 4: 0.3, 5: 0.2}


def concept_set(actions: list[str], rng: random.Random) -> list[str]:
    """Three to five different concepts in random order."""
    size = rng.choices(list(SIZES), list(SIZES.values()))[0]
    words = [*rng.choice(actions).split(), rng.choice(PEOPLE), rng.choice(PLACES), rng.choice(EXTRAS)]
    core, rest = words[:2], rng.sample(words[2:], k=size - 2)
    chosen = core + rest
    if len(set(chosen)) < size:
        return concept_set(actions, rng)
    rng.shuffle(chosen)
    return chosen


def compose(actions: list[str], count: int, taken: set[frozenset[str]], rng: random.Random) -> list[dict]:
    rows: list[dict] = []
    while len(rows) < count:
        concepts = concept_set(actions, rng)
        if frozenset(concepts) not in taken:
            taken.add(frozenset(concepts))
            rows.append({"concepts": concepts})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--exclude", type=Path, help="folder with train.jsonl.gz and dev.jsonl.gz to stay disjoint from"
    )
    parser.add_argument("--train", type=int, default=4096)
    parser.add_argument("--test", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    taken: set[frozenset[str]] = set()
    if args.exclude:
        for name in ("train.jsonl.gz", "dev.jsonl.gz"):
            taken |= {frozenset(row["concepts"]) for row in read_jsonl(args.exclude / name)}
    actions = rng.sample(ACTIONS, k=len(ACTIONS))
    split = len(actions) // 5
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part, count in (("test", actions[:split], args.test), ("train", actions[split:], args.train)):
        rows = compose(part, count, taken, rng)
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(name, len(rows), rows[:3])


if __name__ == "__main__":
    main()
