"""Make what the embedded policy starts from: its SFT rows, its tokenizer, its random initial weights.

    python recipes/embedded/prepare.py COMMONGEN runs/embedded

Writes `sft_copying_train.jsonl.gz` and `sft_train.jsonl.gz` for two rounds of fine-tuning, `sft_dev.jsonl.gz` (rows of
the "concepts" task), and `policy_init/` (Llama architecture).

A small model that starts on human sentences learns them by heart, and fails on words that it has not seen together. So
the first round makes that impossible: every content word is exchanged for a random one and asked for, and the prompt is
the only way to know what comes. The second teaches English to a model that copies, with a word or two exchanged in most
sentences so that it goes on copying.
"""

import argparse
import gzip
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from rsoups.data.tasks import TASKS  # isort: skip  (before torch)

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from rsoups.common.files import read_jsonl

COPYING_VARIANTS = 12
VARIANTS, EXCHANGED = 8, 6
VOCABULARY = 12_000
STOP_WORDS = set(
    """
    a an and are as at be been being but by can could did do does down for from had has have he her hers him his
    how i if in into is it its just like may me my no not of off on one onto or other our out over own she so some
    someone than that the their them then there these they this those through to too two under up upon very was we
    were what when where which while who will with would you your
    """.split()
)


def tidy_sentence(text: str) -> str:
    """One sentence in one style: lower case, single spaces, none before punctuation, one full stop last.

    Lower case, because a word that begins a sentence is then the token that it is in the prompt.
    """
    text = re.sub(r"\s+([.,!?;:])", r"\1", " ".join(text.split())).strip(" .\"'").lower()
    return text + ("" if text.endswith(("!", "?")) else ".")


def content_words(sentence: str) -> list[str]:
    words = [w.strip(".,!?;:'\"()").lower() for w in sentence.split()]
    return sorted({w for w in words if w.isalpha() and len(w) > 2 and w not in STOP_WORDS})


def lemma(word: str, lemmas: Counter[str]) -> str:
    """The data's own concept that `word` inflects, by suffix, the commonest; `word` itself where there is none."""
    stems = [word]
    for suffix, replacements in (("ies", "y"), ("es", ""), ("s", ""), ("ing", "e"), ("ed", "e")):
        if word.endswith(suffix):
            stem = word[: -len(suffix)]
            stems += [stem + replacements, stem]
            if len(stem) > 2 and stem[-1] == stem[-2]:
                stems.append(stem[:-1])  # running -> run
    return max(stems[1:], key=lambda s: lemmas[s]) if any(s in lemmas for s in stems[1:]) else word


def suffix(word: str) -> str:
    """A rough class of inflection."""
    return next((end for end in ("ing", "ed", "ly", "s") if word.endswith(end)), "")


def split(sentence: str) -> list[tuple[str, str]]:
    """Words, each with the punctuation after it."""
    words = [(w.rstrip(".,!?;:"), w) for w in sentence.split()]
    return [(word, original[len(word) :]) for word, original in words]


def is_content(word: str) -> bool:
    return word.isalpha() and len(word) > 2 and word not in STOP_WORDS


class Exchange:
    """Content words by the slots they stand in: between two words, or after one, in one inflection."""

    def __init__(self, sentences: list[str]):
        counts = Counter(word for sentence in sentences for word, _ in split(sentence))
        self._slots: dict[tuple, set[str]] = defaultdict(set)
        for sentence in sentences:
            for _, word, slots in self._content(split(sentence)):
                if counts[word] >= 5:
                    for slot in slots:
                        self._slots[slot].add(word)
        self._sorted = {slot: sorted(words) for slot, words in self._slots.items()}

    @staticmethod
    def _content(words: list[tuple[str, str]]) -> Iterator[tuple[int, str, list[tuple]]]:
        plain = ["<s>", *(word for word, _ in words), "</s>"]
        for i, word in enumerate(plain[1:-1]):
            if is_content(word):
                before, after = plain[i], plain[i + 2]
                yield i, word, [(before, after, suffix(word)), (before, None, suffix(word))]

    def __call__(self, sentence: str, rng: random.Random) -> tuple[str, list[str]]:
        """The sentence with one or two content words exchanged, and the new words."""
        words = split(sentence)
        places = list(self._content(words))
        rng.shuffle(places)
        new = []
        for i, word, slots in places[: rng.randint(1, 2)]:
            fitting = next((self._sorted[s] for s in slots if len(self._sorted.get(s, ())) > 3), [])
            if fitting and (other := rng.choice(fitting)) != word:
                words[i] = (other, words[i][1])
                new.append(other)
        return " ".join(word + mark for word, mark in words), new


def inflected(concepts: list[str], lemmas: Counter[str], rng: random.Random, share: float = 0.5) -> list[str]:
    """Some as they stand in the sentence, some as the data would ask for them."""
    return [lemma(word, lemmas) if rng.random() < share else word for word in concepts]


def copying_rows(rows: list[dict], rng: random.Random) -> list[dict]:
    """Human sentences with every content word exchanged for any word of its inflection, and asked for.

    Half of the prompts ask in the sentence's order: that is learnt first, and the other half from it.
    """
    lemmas = Counter(concept for row in rows for concept in row["concepts"])
    sentences = sorted({tidy_sentence(s) for row in rows for s in row["sentences"]})
    words: dict[str, set[str]] = defaultdict(set)
    for word in [w for s in sentences for w in content_words(s)] + list(lemmas):
        words[suffix(word)].add(word)
    choices = {ending: sorted(group) for ending, group in words.items()}
    out = []
    for sentence in sentences:
        parts = split(sentence)
        if not 2 <= sum(is_content(word) for word, _ in parts) <= 6:
            continue
        for variant in range(COPYING_VARIANTS):
            new = [(rng.choice(choices[suffix(w)]) if is_content(w) else w, mark) for w, mark in parts]
            concepts = [word for (word, _), (old, _) in zip(new, parts, strict=True) if is_content(old)]
            if variant % 2:
                rng.shuffle(concepts)
            text = " ".join(word + mark for word, mark in new)
            out.append({"concepts": inflected(concepts, lemmas, rng, 0.25), "sentences": [text]})
    rng.shuffle(out)
    return out


def sft_rows(rows: list[dict], rng: random.Random) -> list[dict]:
    """Return each human sentence `VARIANTS` times, under different prompts.

    The prompts ask for the data's concepts (once or twice), and for some or all of the sentence's own content words. In
    `EXCHANGED` of the rows a word or two of the sentence are replaced by words that stand between the same neighbors elsewhere.
    """
    lemmas = Counter(concept for row in rows for concept in row["concepts"])
    exchange = Exchange([tidy_sentence(s) for row in rows for s in row["sentences"]])
    out = []
    for row in rows:
        for original in map(tidy_sentence, row["sentences"]):
            for variant in range(VARIANTS):
                sentence, concepts = original, list(row["concepts"])
                if variant >= min(2, VARIANTS - EXCHANGED - 1):
                    new_words = variant >= VARIANTS - EXCHANGED
                    sentence, new = exchange(original, rng) if new_words else (original, [])
                    words = [w for w in content_words(sentence) if w not in new]
                    some = min(len(words), max(0, rng.randint(2, 5) - len(new)))
                    chosen = [*new, *rng.sample(words, k=len(words) if variant % 4 == 2 else some)]
                    concepts = inflected(chosen, lemmas, rng) or concepts
                rng.shuffle(concepts)
                out.append({"concepts": concepts, "sentences": [sentence]})
    rng.shuffle(out)
    return out


def policy_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer in which a word is the same token wherever it stands.

    The three section marks of the prompt format are tokens of their own, spaces included. The text after a mark begins as a
    word inside a sentence does, so prompt and response have the same tokens apart and together.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - 3,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens(
        [AddedToken(mark, normalized=False) for mark in ("### Instruction:", " ### Input:", " ### Response: ")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def policy(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def write_jsonl(rows: list[dict], path: Path) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with CommonGen's train.jsonl.gz and dev.jsonl.gz")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    human = read_jsonl(args.data / "train.jsonl.gz")
    train = sft_rows(human, random.Random(args.seed))
    dev = [
        {"concepts": row["concepts"], "sentences": [tidy_sentence(s) for s in row["sentences"]]}
        for row in read_jsonl(args.data / "dev.jsonl.gz")
    ]
    write_jsonl(copying_rows(human, random.Random(args.seed)), args.out / "sft_copying_train.jsonl.gz")
    write_jsonl(train, args.out / "sft_train.jsonl.gz")
    write_jsonl(dev, args.out / "sft_dev.jsonl.gz")

    task = TASKS["concepts"]
    sentences = sorted({tidy_sentence(s) for row in human for s in row["sentences"]})
    # Prompts too: a concept is written in lower case after a space, as words inside a sentence are.
    prompts = [str(task.prompt(row)).removeprefix("### Instruction:") for row in train[: len(train) // VARIANTS]]
    tokenizer = policy_tokenizer(sentences + prompts)
    tokenizer.save_pretrained(args.out / "policy_init")
    model = policy(tokenizer)
    model.save_pretrained(args.out / "policy_init")
    print(f"{len(train)} SFT rows, {len(tokenizer)} tokens, {model.num_parameters():,} parameters")
    print(tokenizer.tokenize(prompts[0]), tokenizer.tokenize(f"{task.prompt(train[0])}{train[0]['sentences'][0]}"))


if __name__ == "__main__":
    main()
