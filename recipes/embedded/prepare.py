"""Make what the embedded policy starts from: its SFT rows, its tokenizer, its random initial weights.

    python recipes/embedded/prepare.py COMMONGEN runs/embedded

Writes `sft_own_train.jsonl.gz` and `sft_exchanged_train.jsonl.gz` for the two rounds of fine-tuning, `sft_dev.jsonl.gz`
(rows of the "concepts" task), and `policy_init/` (Llama architecture). Each human sentence appears `VARIANTS` times.

The first round teaches English, and leaves a small model that recites the sentences that it was trained on and fails
on words that it has not seen together. The second exchanges content words for others that stand between the same
neighbours elsewhere, and asks for them: the prompt is then the only way to know what comes, so it learns to copy.
"""

import argparse
import gzip
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from rsoups.tasks import TASKS, read_jsonl, tidy_sentence

VARIANTS = 8
VOCABULARY = 8_000
STOP_WORDS = set(
    """
    a an and are as at be been being but by can could did do does down for from had has have he her hers him his
    how i if in into is it its just like may me my no not of off on one onto or other our out over own she so some
    someone than that the their them then there these they this those through to too two under up upon very was we
    were what when where which while who will with would you your
    """.split()
)


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
    """Words in lower case, each with the punctuation after it."""
    words = [(w.rstrip(".,!?;:").lower(), w) for w in sentence.split()]
    return [(word, original[len(word) :]) for word, original in words]


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
            if word.isalpha() and len(word) > 2 and word not in STOP_WORDS:
                before, after = plain[i], plain[i + 2]
                yield i, word, [(before, after, suffix(word)), (before, None, suffix(word))]

    def __call__(self, sentence: str, rng: random.Random) -> tuple[str, list[str]]:
        """The sentence with one to three content words exchanged, and the new words."""
        words = split(sentence)
        places = list(self._content(words))
        rng.shuffle(places)
        new = []
        for i, word, slots in places[: rng.randint(1, 3)]:
            fitting = next((self._sorted[s] for s in slots if len(self._sorted.get(s, ())) > 3), [])
            if fitting and (other := rng.choice(fitting)) != word:
                words[i] = (other, words[i][1])
                new.append(other)
        text = " ".join(word + mark for word, mark in words)
        return text[:1].upper() + text[1:], new


def own_rows(rows: list[dict], rng: random.Random) -> list[dict]:
    """Human sentences, asked for by the data's concepts or by a fresh subset of their own content words."""
    lemmas = Counter(concept for row in rows for concept in row["concepts"])
    out = []
    for row in rows:
        for sentence in map(tidy_sentence, row["sentences"]):
            words = content_words(sentence)
            for variant in range(VARIANTS):
                concepts = list(row["concepts"])
                if variant % 2 and len(words) >= 2:
                    concepts = rng.sample(words, k=min(len(words), rng.randint(2, 5)))
                    concepts = [lemma(w, lemmas) if rng.random() < 0.5 else w for w in concepts]
                rng.shuffle(concepts)
                out.append({"concepts": concepts, "sentences": [sentence]})
    rng.shuffle(out)
    return out


def exchanged_rows(rows: list[dict], rng: random.Random) -> list[dict]:
    """A quarter human sentences as above, the others with words exchanged and asked for."""
    lemmas = Counter(concept for row in rows for concept in row["concepts"])
    exchange = Exchange([tidy_sentence(s) for row in rows for s in row["sentences"]])
    out = []
    for row in rows:
        for original in map(tidy_sentence, row["sentences"]):
            for variant in range(VARIANTS):
                sentence, concepts = original, list(row["concepts"])
                if variant:
                    sentence, new = (original, []) if variant == 1 else exchange(original, rng)
                    words = [w for w in content_words(sentence) if w not in new]
                    # All of its content words now and then: the more a prompt tells, the sooner copying is learnt.
                    more = len(words) if variant % 2 == 0 else min(len(words), max(0, rng.randint(2, 5) - len(new)))
                    concepts = [*new, *rng.sample(words, k=more)] or concepts
                if variant == 2:
                    concepts.sort(key=sentence.lower().find)  # in the sentence's order
                else:
                    rng.shuffle(concepts)
                if variant:
                    concepts = [lemma(w, lemmas) if rng.random() < 0.4 else w for w in concepts]
                out.append({"concepts": concepts, "sentences": [sentence]})
    rng.shuffle(out)
    return out


def policy_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. The three section marks of the prompt format are tokens of their own, spaces included, so that a
    prompt and its response tokenize the same apart and together."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
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
    train = own_rows(human, random.Random(args.seed))
    dev = [
        {"concepts": row["concepts"], "sentences": [tidy_sentence(s) for s in row["sentences"]]}
        for row in read_jsonl(args.data / "dev.jsonl.gz")
    ]
    write_jsonl(train, args.out / "sft_own_train.jsonl.gz")
    write_jsonl(exchanged_rows(human, random.Random(args.seed)), args.out / "sft_exchanged_train.jsonl.gz")
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
