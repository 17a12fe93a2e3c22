"""Preference pairs and random initial models for the embedded rewards.

    python recipes/embedded/rewards.py init COMMONGEN runs/embedded
    python recipes/embedded/rewards.py coverage COMMONGEN runs/embedded --policy rsoups/tiny-llama
    python recipes/embedded/rewards.py naturalness COMMONGEN runs/embedded --policy rsoups/tiny-llama
    python recipes/embedded/rewards.py rating COMMONGEN runs/embedded

Each of the last three writes `NAME_train.jsonl.gz` and `NAME_test.jsonl.gz` with rows `prompt, chosen, rejected`, for
recipes/reward_model.py. Train pairs come from CommonGen's train rows, test pairs from its dev rows.

- coverage: uses all the words, over misses some; or two samples of the policy, of which one uses more. Half of the human
  pairs differ in nothing else (one content word replaced), and a bare list of the words counts as covering: this reward
  is blind to style.
- naturalness: a human sentence, over the policy's own sample for the same words (three in four) or a spoilt copy.
- rating: what people rated higher, among machine sentences for one concept set and the human references themselves.
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from nltk.stem.snowball import SnowballStemmer
from prepare import STOP_WORDS, content_words, tidy_sentence, write_jsonl
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from rsoups.bases.load import load_base, load_tokenizer
from rsoups.common.files import read_jsonl
from rsoups.data.prompts import first_sentence
from rsoups.data.tasks import TASKS

VOCABULARY = 5_000
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
stem = SnowballStemmer("english").stem


def stems(text: str) -> set[str]:
    return {stem(word.strip(".,!?;:'\"()").lower()) for word in text.split()}


def covered(concepts: list[str], sentence: str) -> float:
    """Share of the concepts that the sentence holds in some inflection."""
    have = stems(sentence)
    return mean(stem(c.lower()) in have for c in concepts)


def prompt(concepts: list[str]) -> str:
    return str(TASKS["concepts"].prompt({"concepts": concepts}))


# --- tokenizers and random models ------------------------------------------------------------------------------------


def classifier_tokenizer(kind: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """WordPiece, lower case (ELECTRA) or Unigram with case (DeBERTa-v2); pairs are [CLS] question [SEP] response [SEP]."""
    trainer: trainers.Trainer
    if kind == "electra":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()])
        trainer = trainers.UnigramTrainer(
            vocab_size=VOCABULARY, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False
        )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
        # RewardTrainer feeds ids and mask only: so must whoever scores.
        model_input_names=["input_ids", "attention_mask"],
    )


def classifier(kind: str, vocabulary: int) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "num_labels": 1,
        "pad_token_id": 0,
    }
    if kind == "electra":
        return ElectraForSequenceClassification(ElectraConfig(embedding_size=128, **sizes))
    relative: dict[str, Any] = {
        "relative_attention": True,
        "position_buckets": 16,
        "pos_att_type": ["c2p", "p2c"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    }
    return DebertaV2ForSequenceClassification(DebertaV2Config(**sizes, **relative))


def init(args: argparse.Namespace) -> None:
    rows = read_jsonl(args.data / "train.jsonl.gz")
    texts = [tidy_sentence(s) for row in rows for s in row["sentences"]]
    texts += [", ".join(row["concepts"]) for row in rows]
    for kind in ("deberta", "electra"):
        set_seed(args.seed)
        tokenizer = classifier_tokenizer(kind, texts)
        model = classifier(kind, len(tokenizer))
        tokenizer.save_pretrained(args.out / f"{kind}_init")
        model.save_pretrained(args.out / f"{kind}_init")
        print(kind, len(tokenizer), f"{model.num_parameters():,} parameters")


# --- coverage --------------------------------------------------------------------------------------------------------


class Spoiler:
    """Takes words out of sentences."""

    def __init__(self, rows: list[dict], rng: random.Random):
        self.rng = rng
        self.words = sorted({w for row in rows for s in row["sentences"] for w in content_words(s)})

    def replace(self, sentence: str, concepts: list[str]) -> str:
        """One or two of the concepts' words replaced by other content words."""
        words = sentence.rstrip(".").split()
        wanted = {stem(c.lower()) for c in concepts}
        hits = [i for i, w in enumerate(words) if stem(w.strip(",.'\"").lower()) in wanted]
        for i in self.rng.sample(hits, k=min(len(hits), self.rng.choice((1, 1, 2)))):
            words[i] = self.rng.choice(self.words)
        return tidy_sentence(" ".join(words))

    def spoil(self, sentence: str, concepts: list[str]) -> str:
        """A list of the concepts, or the sentence with words swapped, dropped or repeated."""
        words = sentence.rstrip(".").split()
        kind = self.rng.randrange(4)
        if kind == 0:
            listed = self.rng.sample(concepts, k=len(concepts))
            return tidy_sentence(self.rng.choice((" ", ", ", " and ")).join(listed))
        for _ in range(self.rng.choice((1, 2))):
            i = self.rng.randrange(len(words))
            if kind == 1:
                j = self.rng.randrange(len(words))
                words[i], words[j] = words[j], words[i]
            elif kind == 2 and len(words) > 3:
                del words[i]
            else:
                words.insert(i, self.rng.choice((words[i], self.rng.choice(concepts))))
        return tidy_sentence(" ".join(words).lower())


def coverage_pairs(rows: list[dict], rng: random.Random) -> Iterator[dict]:
    spoiler = Spoiler(rows, rng)
    by_concept = defaultdict(list)
    for row in rows:
        for concept in row["concepts"]:
            by_concept[concept].append(row)
    for row in rows:
        for sentence in map(tidy_sentence, row["sentences"]):
            words = content_words(sentence)
            concepts = list(row["concepts"]) if rng.random() < 0.5 else rng.sample(words, k=min(len(words), 4))
            if len(concepts) < 2 or covered(concepts, sentence) < 1:
                continue
            rng.shuffle(concepts)
            chosen, style = sentence, rng.random()
            if style < 0.5:
                rejected = spoiler.replace(sentence, concepts)
            else:  # a human sentence about some of the words; now and then a bare list of all of them is better
                other = rng.choice(by_concept[rng.choice(row["concepts"])])
                rejected = tidy_sentence(rng.choice(other["sentences"]))
                if style > 0.85:
                    chosen = tidy_sentence(" ".join(rng.sample(concepts, k=len(concepts))))
            if covered(concepts, rejected) < covered(concepts, chosen):
                yield {"prompt": prompt(concepts), "chosen": chosen, "rejected": rejected}


@torch.inference_mode()
def sampled_coverage_pairs(rows: list[dict], rng: random.Random, policy: str, limit: int) -> Iterator[dict]:
    """Of three samples of the policy for the same words, one that uses more of them over one that uses fewer.

    Both are the policy's, so that nothing but the words tells them apart: without these pairs the reward is right about
    people's sentences and noise about the policy's (correlation with the share of words used .41).
    """
    sets = [row["concepts"] for row in rng.sample(rows, k=min(limit, len(rows)))]
    sets = [rng.sample(concepts, k=len(concepts)) for concepts in sets]
    drawn = samples(policy, [prompt(concepts) for concepts in sets for _ in range(3)], temperature=0.8)
    for i, concepts in enumerate(sets):
        scored = [(covered(concepts, text), text) for text in drawn[3 * i : 3 * i + 3]]
        for (a, chosen), (b, rejected) in permutations(scored, 2):
            if a > b:
                yield {"prompt": prompt(concepts), "chosen": chosen, "rejected": rejected}


# --- naturalness -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def samples(policy: str, prompts: list[str], temperature: float = 0.7, batch: int = 256) -> list[str]:
    """One sample for each prompt, cut as rewards see it; at the demo's temperature by default.

    This is a loop of its own, not `rsoups.generation.respond`, which draws its random numbers in another order: the shipped
    rewards were trained and calibrated on the samples that this loop draws, and a rebuild must draw them again.
    """
    tokenizer, model = load_tokenizer(policy, padding_side="left"), load_base(policy, device="cpu").eval()
    out = []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[start : start + batch], return_tensors="pt", padding=True)
        ids = model.generate(**inputs, do_sample=True, top_k=0, temperature=temperature, max_new_tokens=24)
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        out += [first_sentence(text) or "." for text in texts]
        print(f"\r{len(out)}/{len(prompts)} samples", end="", flush=True)
    print()
    return out


def naturalness_pairs(rows: list[dict], rng: random.Random, policy: str, limit: int) -> Iterator[dict]:
    spoiler = Spoiler(rows, rng)
    pairs = [(row["concepts"], tidy_sentence(s)) for row in rows for s in row["sentences"]]
    pairs = [(rng.sample(c, k=len(c)), s) for c, s in rng.sample(pairs, k=min(limit, len(pairs)))]
    asked = [prompt(concepts) for concepts, _ in pairs]
    half = len(asked) // 2
    drawn = samples(policy, asked[:half]) + samples(policy, asked[half:], temperature=1.0)
    for (concepts, sentence), sample in zip(pairs, drawn, strict=True):
        rejected = sample if rng.random() < 0.75 else spoiler.spoil(sentence, concepts)
        if rejected != sentence:
            yield {"prompt": prompt(concepts), "chosen": sentence, "rejected": rejected}


# --- rating ----------------------------------------------------------------------------------------------------------


def rating_groups(rows: list[dict]) -> list[tuple[list[str], list[str], dict[str, float]]]:
    """(concepts, references, candidate -> mean rating) for each set of references that people saw together.

    The files name no concepts: a concept is a content word whose stem most of the references share.
    """
    references: dict[str, list[str]] = defaultdict(list)
    scores: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        references[row["candidate"]].append(row["reference"])
        scores[row["candidate"]] += row["scores"]
    groups: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for candidate, refs in references.items():
        groups[tuple(sorted(set(refs)))][candidate] = mean(scores[candidate])
    out = []
    for together, rated in groups.items():
        seen = defaultdict(list)
        for ref in together:
            for word in content_words(ref):
                seen[stem(word)].append(word)
        concepts = [min(words, key=len) for words in seen.values() if len(words) > 0.7 * len(together)]
        if len(concepts) >= 2 and not STOP_WORDS & set(concepts):
            out.append((concepts, list(together), rated))
    return out


def rating_pairs(rows: list[dict], rng: random.Random, with_references: bool) -> Iterator[dict]:
    for concepts, references, rated in rating_groups(rows):
        shown = prompt(rng.sample(concepts, k=len(concepts)))
        for a, high in rated.items():
            for b, low in rated.items():
                if high - low >= 0.5:
                    yield {"prompt": shown, "chosen": tidy_sentence(a), "rejected": tidy_sentence(b)}
            if with_references and high < 3:  # people rate a candidate against the reference, whose own rating is 5
                yield {"prompt": shown, "chosen": tidy_sentence(rng.choice(references)), "rejected": tidy_sentence(a)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("init", "coverage", "naturalness", "rating"))
    parser.add_argument("data", type=Path, help="folder with CommonGen's rows and ratings")
    parser.add_argument("out", type=Path)
    parser.add_argument("--policy", default="rsoups/tiny-llama", help="whose samples are in the pairs")
    parser.add_argument("--limit", type=int, default=12_000, help="samples of the policy in the train pairs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == "init":
        return init(args)
    set_seed(args.seed)
    for split, source in (("train", "train"), ("test", "dev")):
        rng = random.Random(f"{args.what} {split} {args.seed}")
        if args.what == "rating":
            rows = read_jsonl(args.data / f"ratings_{source}.jsonl.gz")
            pairs = list(rating_pairs(rows, rng, with_references=split == "train"))
        else:
            rows = read_jsonl(args.data / f"{source}.jsonl.gz")
            limit = args.limit if split == "train" else min(args.limit, 2_000)
            if args.what == "coverage":
                pairs = list(coverage_pairs(rows, rng))
                pairs += sampled_coverage_pairs(rows, rng, args.policy, limit // 3) if limit else []
            else:
                pairs = list(naturalness_pairs(rows, rng, args.policy, limit))
        rng.shuffle(pairs)
        write_jsonl(pairs, args.out / f"{args.what}_{split}.jsonl.gz")
        print(args.what, split, len(pairs), *pairs[:4], sep="\n  ")


if __name__ == "__main__":
    main()
