"""Statistical rewards: a response against its prompt's references, by the libraries that papers report with.

Each function makes a reward, ``reward(prompts, completions, references) -> list[float]``, from the ``arguments`` of a card
(``function: bleu``). `references` holds one or more texts for each prompt. A score depends on its own sample only, not on the
batch; nothing is downloaded and no Java runs. Case does not count.

Each raises a RewardError if the library is not installed, an argument is out of range, or a prompt has no references.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from rsoups.common.errors import DatasetError, RewardError
from rsoups.common.files import read_jsonl

__all__ = ["bleu", "cider", "meteor", "rouge_l"]  # what a card may name

MetricReward = Callable[[Sequence[str], Sequence[str], Sequence[Sequence[str]]], list[float]]

_WORD = re.compile(r"\w+(?:'\w+)*")


def bleu(order: int = 4) -> MetricReward:
    """BLEU of n-grams up to `order` (Papineni et al. 2002), 0 to 1: a precision, with a penalty for short responses.

    sacrebleu's sentence score over 100: its 13a tokens in lower case, exponential smoothing, and orders up to the response's
    length only.
    """
    if order not in (1, 2, 3, 4):
        raise RewardError(f"bleu: order is {order!r}, must be 1, 2, 3 or 4")
    metric = library("sacrebleu.metrics").BLEU(lowercase=True, max_ngram_order=order, effective_order=True)

    def score(response: str, references: list[str]) -> float:
        return min(1.0, metric.sentence_score(response, references).score / 100)  # 100.00000000000004 is 100

    return _against_references(f"bleu-{order}", score)


def rouge_l(score: str = "fmeasure") -> MetricReward:
    """ROUGE-L, 0 to 1: the longest common subsequence over the words of the response (precision) or the reference (recall).

    rouge-score's, without stemming; of several references the one with the highest F counts (its `score_multi`). It reads
    the letters a to z and digits only.

    Args:
        score: ``"precision"``, ``"recall"`` or ``"fmeasure"`` (Lin 2004).
    """
    if score not in ("precision", "recall", "fmeasure"):
        raise RewardError(f"rouge_l: score is {score!r}, must be precision, recall or fmeasure")
    scorer = library("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return _against_references(
        f"rouge-l-{score}", lambda response, refs: getattr(scorer.score_multi(refs, response)["rougeL"], score)
    )


def meteor() -> MetricReward:
    """METEOR (Lavie and Agarwal 2007), 0 to 1: words aligned exactly, then by stem; recall counts nine times precision.

    NLTK's, for the best of the references, without the stage of synonyms: WordNet does not come with NLTK, and a score must
    not depend on whether it is installed. So the score is at most NLTK's with WordNet.
    """
    metric = library("nltk.translate.meteor_score").meteor_score

    class NoSynonyms:
        @staticmethod
        def synsets(word: str) -> list[Any]:
            return []

    def score(response: str, references: list[str]) -> float:
        return metric([words(text) for text in references], words(response), wordnet=NoSynonyms)

    return _against_references("meteor", score)


def cider(corpus: str, column: str = "references") -> MetricReward:
    """CIDEr (Vedantam et al. 2015), 0 to 10: cosine of tf-idf weighted n-grams up to 4, the mean over the references.

    pycocoevalcap's, with its clipping and its penalty for other lengths. Document frequencies are counted once, in a named
    reference set: one row is one document, its texts together. pycocoevalcap itself counts them in what it is given to
    score, so that a batch of one would score 0.

    Args:
        corpus: JSON lines (.jsonl, .jsonl.gz), the train references say.
        column: Of the corpus: a list of texts in each row; rows without any are left out.
    """
    scorer = library("pycocoevalcap.cider.cider_scorer")
    try:
        rows = [row[column] for row in read_jsonl(corpus) if row.get(column)]
    except DatasetError as error:
        raise RewardError(f"cider: cannot read the reference set {corpus!r}: {error}") from None
    if not rows:
        raise RewardError(f"cider: no row of {corpus!r} has texts in a column {column!r}")
    documents = [[" ".join(words(text)) for text in _texts(row)] for row in rows]
    counts: Counter[tuple[str, ...]] = Counter()
    for document in documents:
        counts.update({ngram for text in document for ngram in scorer.precook(text)})
    # An n-gram of one document weighs as much as one of none: log max(1, n).
    frequencies = Counter({ngram: count for ngram, count in counts.items() if count > 1})
    others = [()] * (len(documents) - 1)

    def score(response: str, references: list[str]) -> float:
        sample = scorer.CiderScorer(" ".join(words(response)), [" ".join(words(text)) for text in references])
        sample.document_frequency = frequencies
        sample.crefs += others  # only their number counts
        return float(sample.compute_cider()[0])

    return _against_references("cider", score)


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation: METEOR and CIDEr compare these."""
    return _WORD.findall(text.lower())


def library(name: str, extra: str = "metrics") -> Any:
    """Return a module of an extra.

    Raises:
        RewardError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise RewardError(f"this reward needs {package}: pip install 'rsoups[{extra}]' ({error})") from None


def _against_references(name: str, score: Callable[[str, list[str]], float]) -> MetricReward:
    """Make a reward's function of the score of one response against its references."""

    def reward(prompts: Sequence[str], completions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        scores = []
        for prompt, completion, given in zip(prompts, completions, references, strict=True):
            texts = _texts(given)
            if not texts:
                raise RewardError(
                    f"reward {name!r}: no references for prompt {prompt!r}, and it compares responses with them"
                )
            scores.append(score(completion, texts))
        return scores

    reward.__name__ = name
    return reward


def _texts(references: str | Sequence[str]) -> list[str]:
    return [references] if isinstance(references, str) else list(references)
